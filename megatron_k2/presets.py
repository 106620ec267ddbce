"""Published model shapes as frozen data, a source beside every number.

Field names are Megatron's; the Hugging Face spelling of the same field is given where it differs.
Sources, abbreviated in the comments below:

- ``config``: ``config.json`` of the released moonshotai/Kimi-K2-Instruct.
- ``report``: "Kimi K2: Open Agentic Intelligence", arXiv:2507.20534.
- ``moonlight``: "Muon is Scalable for LLM Training", arXiv:2502.16982, and the ``config.json`` of
  moonshotai/Moonlight-16B-A3B.
- ``choice``: stated nowhere; chosen here, with the reason.
"""

import difflib
from dataclasses import dataclass, field

from megatron_k2.errors import UserError


@dataclass(frozen=True)
class YarnScaling:
    """YaRN rotary scaling, ``rope_scaling`` of the released config (arXiv:2309.00071)."""

    rotary_scaling_factor: float
    """How many times longer the context becomes, ``factor``."""
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class TrainingDefaults:
    """Batch, schedule and optimizer of a preset; every field can be overridden by its flag."""

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    """Sequences of one optimizer step."""
    train_samples: int
    """Sequences of the whole run."""
    lr: float
    min_lr: float
    lr_warmup_samples: int
    lr_decay_samples: int
    """Sequences after which the learning rate has reached ``min_lr``."""
    lr_wsd_decay_samples: int
    """Length of the final cosine decay of the warm-up-stable-decay schedule, in sequences."""
    weight_decay: float = 0.1  # report 2.5: 0.1 throughout
    adam_beta1: float = 0.9  # moonlight, toy_train
    adam_beta2: float = 0.95  # moonlight, toy_train
    adam_eps: float = 1e-8  # moonlight, toy_train
    muon_momentum: float = 0.95  # moonlight 2.2; not stated for K2
    muon_ns_steps: int = 5  # moonlight 2.2
    clip_grad: float = 1.0  # choice: not stated for K2; Megatron's default
    qk_clip_threshold: float = 100.0  # report 2.1, tau


@dataclass(frozen=True)
class ModelPreset:
    """One model: shape, routing, position encoding, and how it is trained by default."""

    name: str
    source: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the leading dense layers' SwiGLU, ``intermediate_size``."""
    num_attention_heads: int
    q_lora_rank: int | None
    """Latent width of the query; ``None`` where the query has no down-projection."""
    kv_lora_rank: int
    qk_head_dim: int
    """Per-head width without position, ``qk_nope_head_dim``."""
    qk_pos_emb_head_dim: int
    """Per-head width that rotary embedding turns, ``qk_rope_head_dim``."""
    v_head_dim: int
    num_dense_layers: int
    """Leading layers without experts, ``first_k_dense_replace``."""
    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    num_shared_experts: int
    moe_router_topk_scaling_factor: float
    """Multiplies the normalised weights of the chosen experts, ``routed_scaling_factor``."""
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    max_position_embeddings: int
    """Longest context of the released model (after YaRN)."""
    training: TrainingDefaults
    norm_epsilon: float
    rotary_base: float = 50000.0  # config, moonlight: rope_theta
    yarn: YarnScaling | None = None
    latent_norm_epsilon: float = 1e-6  # the released modeling code builds q_a/kv_a norms with it
    init_method_std: float = 0.02  # config: initializer_range
    moe_aux_loss_coeff: float = 1e-3  # config: aux_loss_alpha, seq_aux
    moe_router_bias_update_rate: float = 1e-3  # moonlight App. C; not stated for K2
    num_mtp_layers: int = 0
    """Prediction layers behind the last one (DeepSeek-V3: 1), ``num_nextn_predict_layers``."""
    tie_word_embeddings: bool = field(default=False, init=False)  # config

    @property
    def moe_shared_expert_intermediate_size(self) -> int:
        """Width of the shared experts as one SwiGLU."""
        return self.num_shared_experts * self.moe_ffn_hidden_size

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts: all but the leading dense ones."""
        return self.num_layers - self.num_dense_layers


K2_TOKENS_PER_STEP = 2**26
"""Report 2.5: 67M tokens a batch, in every phase of the training."""
K2_PRETRAIN_TOKENS = 15_500 * 10**9
"""Report 2.5: 10T tokens at the highest rate, warm-up included, and the cosine's 5.5T. In tokens,
since a number of sequences of 4,096 would round it."""
K2_COSINE_TOKENS = 5_500 * 10**9
K2_WARMUP_STEPS = 500
"""Report 2.5: steps in which the rate rises from 0."""

_K2_SEQ = 4096  # report 2.5
_K2_BATCH = K2_TOKENS_PER_STEP // _K2_SEQ

KIMI_K2 = ModelPreset(
    name="kimi-k2",
    source="config.json of moonshotai/Kimi-K2-Instruct; arXiv:2507.20534 sections 2.3, 2.5",
    num_layers=61,  # config
    hidden_size=7168,  # config
    ffn_hidden_size=18432,  # config
    num_attention_heads=64,  # config; report 2.3
    q_lora_rank=1536,  # config
    kv_lora_rank=512,  # config
    qk_head_dim=128,  # config
    qk_pos_emb_head_dim=64,  # config
    v_head_dim=128,  # config
    num_dense_layers=1,  # config: first_k_dense_replace
    num_moe_experts=384,  # config; report 2.3
    moe_router_topk=8,  # config: num_experts_per_tok
    moe_ffn_hidden_size=2048,  # config: moe_intermediate_size
    num_shared_experts=1,  # config
    moe_router_topk_scaling_factor=2.827,  # config: routed_scaling_factor
    vocab_size=163840,  # config
    bos_token_id=163584,  # config
    eos_token_id=163585,  # config
    max_position_embeddings=131072,  # config
    norm_epsilon=1e-6,  # config: rms_norm_eps
    yarn=YarnScaling(  # config: rope_scaling
        rotary_scaling_factor=32.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    training=TrainingDefaults(
        seq_length=_K2_SEQ,
        micro_batch_size=1,  # choice: not stated
        global_batch_size=_K2_BATCH,
        train_samples=K2_PRETRAIN_TOKENS // _K2_SEQ,
        lr=2e-4,  # report 2.5
        min_lr=2e-5,  # report 2.5
        lr_warmup_samples=K2_WARMUP_STEPS * _K2_BATCH,
        lr_decay_samples=K2_PRETRAIN_TOKENS // _K2_SEQ,
        lr_wsd_decay_samples=K2_COSINE_TOKENS // _K2_SEQ,
    ),
)

MOONLIGHT_16B_A3B = ModelPreset(
    name="moonlight-16b-a3b",
    source="config.json of moonshotai/Moonlight-16B-A3B; arXiv:2502.16982 section 3.2",
    num_layers=27,
    hidden_size=2048,
    ffn_hidden_size=11264,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    num_dense_layers=1,
    num_moe_experts=64,
    moe_router_topk=6,
    moe_ffn_hidden_size=1408,
    num_shared_experts=2,
    moe_router_topk_scaling_factor=2.446,
    vocab_size=163840,
    bos_token_id=163584,
    eos_token_id=163585,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    training=TrainingDefaults(
        seq_length=8192,
        micro_batch_size=1,  # choice: not stated
        global_batch_size=2048,  # moonlight 3.3, first stage
        train_samples=5_700_000_000_000 // 8192,  # moonlight: 5.7T tokens
        lr=4.2e-4,  # moonlight 3.3
        min_lr=4.2e-5,  # moonlight 3.3
        lr_warmup_samples=2000 * 2048,  # moonlight 3.3: 2k steps
        lr_decay_samples=5_700_000_000_000 // 8192,
        lr_wsd_decay_samples=5_200_000_000_000 // 8192,  # moonlight 3.3: cosine from 33B to 5.2T
    ),
)

K2_TINY = ModelPreset(
    name="k2-tiny",
    source="choice: every K2 feature at a size that trains in minutes on two cores",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_head_dim=32,
    qk_pos_emb_head_dim=16,
    v_head_dim=32,
    num_dense_layers=1,
    num_moe_experts=32,
    moe_router_topk=4,
    moe_ffn_hidden_size=64,
    num_shared_experts=1,
    moe_router_topk_scaling_factor=2.827,
    vocab_size=4096,
    bos_token_id=0,
    eos_token_id=1,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    yarn=YarnScaling(16.0, 256, 1.0, 1.0, 1.0, 1.0),
    training=TrainingDefaults(
        seq_length=256,
        micro_batch_size=8,
        global_batch_size=16,
        train_samples=16 * 240,
        lr=4e-3,
        min_lr=4e-4,
        lr_warmup_samples=16 * 20,
        lr_decay_samples=16 * 240,
        lr_wsd_decay_samples=16 * 96,
        qk_clip_threshold=6.0,  # choice: low enough that this run meets it,
    ),
)

K2_MINI = ModelPreset(
    name="k2-mini",
    source="choice: about 100M parameters, K2's ratios, for an afternoon on one machine",
    num_layers=8,
    hidden_size=384,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=96,
    qk_head_dim=48,
    qk_pos_emb_head_dim=24,
    v_head_dim=48,
    num_dense_layers=1,
    num_moe_experts=64,
    moe_router_topk=4,
    moe_ffn_hidden_size=160,
    num_shared_experts=1,
    moe_router_topk_scaling_factor=2.827,
    vocab_size=16384,
    bos_token_id=0,
    eos_token_id=1,
    max_position_embeddings=16384,
    norm_epsilon=1e-6,
    yarn=YarnScaling(16.0, 1024, 1.0, 1.0, 1.0, 1.0),
    training=TrainingDefaults(
        seq_length=1024,
        micro_batch_size=2,
        global_batch_size=32,
        train_samples=32 * 5000,
        lr=2e-3,
        min_lr=2e-4,
        lr_warmup_samples=32 * 100,
        lr_decay_samples=32 * 5000,
        lr_wsd_decay_samples=32 * 2000,
        qk_clip_threshold=100.0,
    ),
)

PRESETS = {p.name: p for p in (KIMI_K2, MOONLIGHT_16B_A3B, K2_TINY, K2_MINI)}


def get_preset(name: str) -> ModelPreset:
    """The preset called ``name``.

    Raises:
        UserError: if there is none; the message names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"one of: {', '.join(PRESETS)}"
    raise UserError(f"--preset '{name}' is not known; {hint}")
