"""Twenty passages of Python's documentation, rephrased by a small real model, gated and shown.

The passages come with every Python (``pydoc_data.topics``). `make demo-rephrase` builds what this
needs, starts the model's server and runs it; a server of your own is taken by ``--endpoint``.

    python examples/rephrasing/demo.py --endpoint http://localhost:8000 --out runs/demo-rephrase
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from pydoc_data.topics import topics

LICENCE = "PSF-2.0"
WORDS = (40, 110)
"""Of a passage."""


def passages(number: int) -> list[str]:
    """Paragraphs of prose, the first of each topic that is long enough and no code."""
    found = []
    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            plain = " ".join(paragraph.split())
            is_prose = not paragraph.startswith((" ", "*", "-")) and "::" not in plain
            if is_prose and WORDS[0] <= len(plain.split()) <= WORDS[1] and plain.endswith("."):
                found.append(plain)
                break
    return found[:number]


def rephrase(*words: str) -> None:
    """One verb."""
    subprocess.run([sys.executable, "-m", "megatron_k2", "rephrase", *words], check=False)


def wait_for(endpoint: str, seconds: float = 300.0) -> None:
    """Until it names its models: a server that is loading answers 503."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{endpoint}/v1/models"):
            return
        time.sleep(1.0)
    raise SystemExit(f"{endpoint} does not answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", required=True, metavar="URL")
    parser.add_argument("--teacher-licence", default="not stated")
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-rephrase"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wait_for(options.endpoint)
    source = options.out / "passages.jsonl"
    if not source.exists():
        lines = (json.dumps({"text": text}) + "\n" for text in passages(options.number))
        source.write_text("".join(lines))
    run = options.out / "run"
    licences = ["--source-licence", LICENCE, "--teacher-licence", options.teacher_licence]
    rephrase(
        *("run", "--input", str(source), "--endpoint", options.endpoint, "--output", str(run)),
        *("--shards", "1", "--concurrency", "2", "--votes", "1", *licences),
    )
    rephrase("report", str(run), "--html", str(options.out / "page.html"))
    for name in ("kept", "rejected"):
        path = run / f"{name}.jsonl"
        for line in path.read_text().splitlines()[:3] if path.is_file() else ():
            record = json.loads(line)
            print(f"\n{name} ({record['prompt']}; {record['reason'][:200]}):\n{record['text']}")


if __name__ == "__main__":
    main()
