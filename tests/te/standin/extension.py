"""The module that stands for ``transformer_engine_torch``: its enums, its names, what is computed.

Enum values are those of the compiled extension (compared once against it, releases 2.17.1 and
2.20.2). A name without a stand-in raises ``NotImplementedError`` when called, never when imported.
"""

import enum
import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tests.te.standin import kernels, optimizer, quantization

CALLS: Counter[str] = Counter()
"""Kernel name -> calls, so that a test can say which kernels a path would have reached."""

ENUMS = {
    "DType": "kByte=0 kInt32=2 kFloat32=4 kFloat16=5 kBFloat16=6 kFloat8E4M3=7 kFloat8E5M2=8 "
    "kFloat4E2M1=10",
    "NVTE_Bias_Type": "NVTE_NO_BIAS=0 NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK=0 NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX=0 NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_QKV_Format": "NVTE_SBHD=0 NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD "
    "NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD NVTE_QKV_Format_NOT_SET",
    "NVTE_QKV_Layout": "NVTE_SB3HD=0 NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D "
    "NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD "
    "NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD "
    "NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD "
    "NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD "
    "NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD "
    "NVTE_QKV_Layout_NOT_SET",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend=-1 NVTE_F16_arbitrary_seqlen=1 NVTE_FP8=2",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING=0 NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D "
    "NVTE_BLOCK_SCALING_2D NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING=100",
    "Float8BlockScaleTensorFormat": "GEMM_READY=0 COMPACT=1 INVALID=2",
    "CommOverlapType": "RS=0 AG=1",
    "CommOverlapAlgo": "BULK_OVERLAP_AG=0 BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P "
    "SPLIT_PIPELINED_RS SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P "
    "ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
    "FP8FwdTensors": "GEMM1_INPUT=0 GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT "
    "GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1=0 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "NVTERoutingMapFormat": "BYTEMAP=0 BITMAP_U8=1",
    "NVTEQBHistogramMode": "TWO_KERNEL=0 FUSED_ATOMIC=1",
}

CLASSES = (
    "CommOverlapHelper CommOverlap CommOverlapP2P CommOverlapCore CommOverlapBase "
    "CommOverlapP2PBase FP8TensorMeta"
).split()

CONSTANTS: dict[str, Any] = {
    "get_num_cublas_streams": 1,
    "get_cudnn_version": 92400,
    "get_cublasLt_version": 130101,
    "get_stream_priority_range": (0, -5),
    "device_supports_multicast": False,
    "ubuf_built_with_mpi": False,
}

STAR_IMPORTED = """
bgrad_group_quantize bgrad_quantize bulk_allocate bulk_overlap_ag_with_external_gemm
clamped_dswiglu clamped_swiglu compute_amax convert_bshd_to_thd convert_thd_to_bshd
create_empty_quantized_tensor dbias_dgelu dbias_dqgelu dbias_drelu dbias_dsilu dbias_dsrelu
dequantize dgeglu dgelu dglu dqgeglu dqgelu dreglu drelu dropout_bwd dropout_fwd dsilu dsreglu
dsrelu dswiglu fa_prepare_bwd fa_prepare_fwd fp8_transpose fused_attn_bwd fused_attn_fwd geglu gelu
get_fused_attn_backend glu group_dequantize group_quantize layernorm_bwd layernorm_fwd
multi_tensor_adam multi_tensor_adam_capturable multi_tensor_adam_capturable_master
multi_tensor_adam_fp8 multi_tensor_adam_param_remainder multi_tensor_compute_scale_and_scale_inv
multi_tensor_compute_scale_inv_e8m0 multi_tensor_quantize multi_tensor_scale_tensor multi_tensor_sgd
multi_tensor_unscale_l2norm newton_schulz qgeglu qgelu reglu relu rmsnorm_bwd_add silu sreglu srelu
swap_first_dims swiglu te_general_grouped_gemm_for_discrete_in
te_general_grouped_gemm_for_discrete_out te_general_grouped_gemm_for_grouped_tensor
fused_amax_and_scale_update_after_reduction multi_tensor_transpose_to_bhsd
multi_tensor_swizzle_scales_for_gemm_ moe_permute_fwd moe_permute_bwd moe_unpermute_fwd
moe_unpermute_bwd
""".split()
"""Names that TE or Megatron import by value, which a lazy ``__getattr__`` alone would not give."""


class _Extension(types.ModuleType):
    """Any other name is a kernel that raises."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_kwargs: Any) -> Any:
            CALLS[name] += 1
            raise NotImplementedError(f"transformer_engine_torch.{name} has no CPU stand-in")

        missing.__name__ = name
        return missing


def _enum(name: str, members: str) -> type[enum.IntEnum]:
    values, following = {}, 0
    for member in members.split():
        key, _, value = member.partition("=")
        values[key] = int(value) if value else following
        following = values[key] + 1
    return enum.IntEnum(name, values)


def _counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` as compiled code is to autograd: nothing of it is recorded."""

    @functools.wraps(kernel)
    @torch.no_grad()
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return kernel(*args, **kwargs)

    return call


def make_extension() -> types.ModuleType:
    """The stand-in module, complete."""
    module = _Extension("transformer_engine_torch")
    module.__file__ = __file__
    for name, members in ENUMS.items():
        setattr(module, name, _enum(name, members))
    for name in CLASSES:
        setattr(module, name, type(name, (), {}))
    for name in STAR_IMPORTED:
        setattr(module, name, module.__getattr__(name))
    for name, value in CONSTANTS.items():
        setattr(module, name, lambda *_args, _value=value, **_kwargs: _value)
    computed = kernels.KERNELS | quantization.KERNELS | optimizer.KERNELS
    for name, kernel in computed.items():
        setattr(module, name, _counted(name, kernel))
    return module
