"""Recipes through NeMo-Run: a task for each, executors, an experiment for a chain.

``nemo_run`` is imported by the functions that need it (``pip install -e '.[launch]'``). A task is
a ``run.Partial`` of ``train_recipe``, which names its recipe, so that what NeMo-Run writes down
beside the experiment is a handful of words.

NeMo-Run's own sbatch script queues a job again when it fails, up to ``max_retries``; ours
(``launch/slurm.py``) when it was interrupted. So a task that ends before its last step ends with an
error here. Both resume from the last checkpoint, and both check the nodes at every start.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.launch.cluster import Cluster
from megatron_k2.launch.environment import cluster_environment
from megatron_k2.launch.graph import PhaseRun, is_done
from megatron_k2.launch.local import check_fits_here, check_start, write_recipe_record
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_plan import has_engines
from megatron_k2.launch.slurm import check_arguments, num_nodes
from megatron_k2.lock.directory import hold
from megatron_k2.run.iterations import last_iteration
from megatron_k2.run.record import RUN

MAX_RETRIES = 3
"""Starts after a failure. Ours."""

SLURM_RANKS = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "MASTER_ADDR": "SLURM_LAUNCH_NODE_IPADDR",
}


def train_recipe(
    recipe: str,
    save: str,
    start_from: str | None = None,
    overrides: list[str] | None = None,
    force: bool = False,
) -> None:
    """Train one recipe; what every rank of a task runs.

    Args:
        recipe: a name of ``megatron-k2 launch --list``.
        save: the run's directory; the same task resumes from it.
        start_from: the previous phase's directory.
        overrides: assignments of ``--set``.
        force: also where the planner says it does not fit.
    """
    from megatron_k2.launch.overrides import apply
    from megatron_k2.recipes import get_recipe
    from megatron_k2.training.pretrain import run, single_process_environment

    chosen = apply(get_recipe(recipe), overrides or [], force=force)
    check_is_one_program(chosen)
    flags = chosen.program_flags(save, start_from)
    _take_slurms_ranks()
    single_process_environment()
    with _first_rank_holds(save):
        check_nodes(chosen, flags)
        if os.environ["RANK"] == "0":
            write_recipe_record(chosen, save, start_from, overrides or [])
        try:
            run(flags, chosen.stage.program)
        except SystemExit as end:  # Megatron's way out after a signal and a save
            if end.code:
                raise
    if os.environ["RANK"] == "0" and (step := last_iteration(Path(save))) < chosen.steps:
        sys.exit(f"ended at step {step} of {chosen.steps}: to be started again")


@contextmanager
def _first_rank_holds(save: str) -> Iterator[None]:
    """NeMo-Run starts a second job of a run beside the first: it ends here, with code 2."""
    if os.environ["RANK"] != "0":
        yield
        return
    with ExitStack() as stack:
        try:
            held = stack.enter_context(hold(Path(save), RUN))
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        stack.enter_context(held.handed_over())
        yield


def _take_slurms_ranks() -> None:
    """Where srun started this process: the variables that torchrun would have set."""
    if "SLURM_PROCID" not in os.environ or "RANK" in os.environ:
        return
    job = int(os.environ["SLURM_JOB_ID"])
    os.environ |= {name: os.environ[slurms] for name, slurms in SLURM_RANKS.items()}
    os.environ.setdefault("MASTER_PORT", str(20000 + 2 * (job % 10000)))


def check_nodes(recipe: Recipe, flags: list[str]) -> None:
    """``launch/node_check.py`` beside this rank, with what the plain script gives it.

    A process of its own gives back its GPU and process groups. It meets the others one port above
    the training's, lest a rank that is through finds the check's store there; under torchrun at
    torchrun's store.

    Raises:
        SystemExit: with its code, where it found something; it has said what.
    """
    program = [sys.executable, "-m", "megatron_k2.launch.node_check"]
    port = int(os.environ["MASTER_PORT"])
    if port and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        port += 1  # 0, of a process by itself, is any
    done = subprocess.run(
        [*program, *check_arguments(recipe), *flags],
        env=os.environ | {"MASTER_PORT": str(port)},
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)


def task(
    recipe: str,
    save: str,
    start_from: str | None,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
) -> Any:
    """A ``run.Partial`` of ``train_recipe``, whose arguments these are.

    Raises:
        UserError: without NeMo-Run.
    """
    return nemo_run().Partial(
        train_recipe,
        recipe=recipe,
        save=os.path.abspath(save),
        start_from=os.path.abspath(start_from) if start_from else None,
        overrides=list(overrides),
        force=force,
    )


def check_is_one_program(recipe: Recipe) -> None:
    """Refuse what is more than one program on every rank: a task of NeMo-Run is just that.

    Raises:
        UserError: naming the way out.
    """
    if has_engines(recipe):
        raise UserError(
            f"{recipe.name} is a trainer, engines, environments and a controller in one "
            "allocation, and NeMo-Run starts one of them; launch it without --nemo-run"
        )


def slurm_executor(recipe: Recipe, cluster: Cluster, base: Path) -> Any:
    """A ``run.SlurmExecutor``: one task a GPU, what ``launch/slurm.py`` renders where it can.

    Args:
        recipe: its size and environment.
        cluster: as for the plain script; NeMo-Run insists on an account and a partition.
        base: NeMo-Run's own directory; jobs run in ``<base>/experiments``.

    Raises:
        UserError: without NeMo-Run, an account or a partition; see ``check_is_one_program``.
    """
    check_is_one_program(recipe)
    if not cluster.account or not cluster.partition:
        raise UserError("NeMo-Run asks for --account and --partition (or a --profile with them)")
    run = nemo_run()
    nodes = num_nodes(recipe)
    tasks = recipe.layout.world_size // nodes
    on_gpus = {} if recipe.is_cpu else {"gpus_per_node": tasks, "exclusive": True}
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        time=cluster.time,
        signal=f"TERM@{cluster.seconds_to_save}",  # to the ranks; the task then ends with an error
        nodes=nodes,
        ntasks_per_node=tasks,
        container_image=cluster.container,
        container_mounts=list(cluster.mounts),
        env_vars=cluster_environment(recipe.layout) | dict(cluster.environment),
        additional_parameters={"requeue": True},
        # The checkout is on a file system that every node sees; nothing is packed.
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=str(base.absolute() / "experiments")),
        retries=MAX_RETRIES,
        **on_gpus,
    )


def local_executor(recipe: Recipe) -> Any:
    """A ``run.LocalExecutor`` with torchrun where there are several ranks.

    Raises:
        UserError: for a recipe of a cluster; without NeMo-Run, or torchrun where it is needed;
            see ``check_is_one_program``.
    """
    check_is_one_program(recipe)
    check_fits_here(recipe)
    size = recipe.layout.world_size
    if size > 1 and shutil.which("torchrun") is None:
        raise UserError("NeMo-Run starts torchrun, which is not on PATH: activate the environment")
    return nemo_run().LocalExecutor(
        ntasks_per_node=size,
        launcher="torchrun" if size > 1 else None,
        env_vars={"OMP_NUM_THREADS": "1"},
    )


@contextmanager
def _experiment(
    runs: Sequence[PhaseRun], overrides: Sequence[str], cluster: Cluster | None, *, force: bool
) -> Iterator[Any]:
    """A task for every run that is not done, each after the one before it."""
    run = nemo_run()
    base = _base(runs).absolute()
    with run.Experiment("megatron_k2", base_dir=str(base), clean_mode=True) as experiment:
        before: list[str] = []
        for recipe, save, start_from in (one for one in runs if not is_done(one)):
            executor = slurm_executor(recipe, cluster, base) if cluster else local_executor(recipe)
            one = task(recipe.name, save, start_from, overrides, force=force)
            before = [
                experiment.add(
                    one, executor=executor, name=recipe.name, dependencies=before or None
                )
            ]
        yield experiment


def _base(runs: Sequence[PhaseRun]) -> Path:
    """NeMo-Run's own directory, beside the first run's.

    Not "nemo_run": without a container NeMo-Run writes the job's directory over that name.
    """
    return Path(runs[0][1]).parent / "nemo"


def show_experiment(
    runs: Sequence[PhaseRun],
    overrides: Sequence[str],
    cluster: Cluster | None,
    *,
    force: bool = False,
) -> None:
    """Print what NeMo-Run would start: its own sbatch scripts, or its local commands.

    Raises:
        UserError: without NeMo-Run, or from the executors.
    """
    with _experiment(runs, overrides, cluster, force=force) as experiment:
        experiment.dryrun()


def run_experiment(
    runs: Sequence[PhaseRun],
    overrides: Sequence[str],
    cluster: Cluster | None,
    *,
    waits: bool,
    force: bool = False,
) -> str:
    """One experiment: a task for every run that is not done, each after the one before it.

    Args:
        runs: in order.
        overrides: of ``--set``, already applied to ``runs``.
        cluster: a Slurm's; ``None`` runs here.
        waits: return when all have ended, with their log on the terminal; else at once.
        force: was given when they were applied.

    Returns:
        The experiment's id, for ``nemo experiment status`` and its like.

    Raises:
        UserError: without NeMo-Run, a checkpoint to start from, or when a run fell short and
            ``waits``.
    """
    for recipe, save, start_from in [one for one in runs if not is_done(one)][:1]:
        check_start(recipe, save, start_from)  # the others start from what this one leaves
    with _experiment(runs, overrides, cluster, force=force) as experiment:
        experiment.run(sequential=cluster is None, detach=not waits, tail_logs=waits)
    # NeMo-Run does not know how a local task ended; the checkpoint does.
    if waits and (short := [one[0].name for one in runs if not is_done(one)]):
        raise UserError(
            f"{', '.join(short)} did not reach the last step; logs are below {_base(runs)}"
        )
    return str(experiment._id)


def nemo_run() -> Any:
    """The module ``nemo_run``.

    Raises:
        UserError: where it, or what it needs, is not installed.
    """
    try:
        import nemo_run as module
    except ModuleNotFoundError as error:
        raise UserError(
            f"NeMo-Run cannot be imported ({error}); pip install 'nemo-run>=0.11,<0.12' "
            "'leptonai<0.47', or launch without --nemo-run"
        ) from None
    return module
