"""Tiny models of llama.cpp's architectures with random weights, for tests of the runtime.

A model is made from hyperparameters alone: llama.cpp creates every tensor that its architecture asks for and has us fill it
(llama_model_init_from_user). Weights are drawn so that attention is not flat, else a lost key would not be seen: matrices have a
variance of one over their inputs, those of queries and keys more, norms of queries and keys are 1.5.
"""

from __future__ import annotations

import ctypes
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from tca_gguf import llama, native
from tca_gguf.budgets import SLIDING, Budgets

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_VOCAB, N_SWA = 256, 4, 2, 128, 256, 40

Value = int | float | bool | str | list[int] | list[float]

# Keys of every model; an architecture ignores what it does not know. Names without "general." or "tokenizer." get its prefix.
COMMON: dict[str, Value] = {
    "context_length": 4096, "embedding_length": N_EMBD, "feed_forward_length": N_FF, "vocab_size": N_VOCAB,
    "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD_KV,
    "attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-6,
    "rope.freq_base": 1e4, "tokenizer.ggml.model": "no_vocab",
}  # fmt: skip
MOE: dict[str, Value] = {
    "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1, "expert_weights_scale": 1.0, "expert_weights_norm": True, "expert_gating_func": 2,
    "leading_dense_block_count": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """An architecture and what it needs beyond COMMON.

    layers: its number of layers; nextn: prediction layers behind them; moe: with experts; stored: the layers that the ragged store must hold (None: all); embd: size of
    token embeddings, small where the graph multiplies them (else attention is lost beside them); qk: weights of
    the norms of queries and keys; positions: they are in the
    embeddings; opaque: keys are rotated in a way that no table says; recurrent: some layers are; sinks: attention has them; mixes:
    llama.cpp's own logits of a sequence depend on the others; variant: of the architecture.
    """

    arch: str
    keys: dict[str, Value] = field(default_factory=dict)
    layers: int = 2
    nextn: int = 0
    moe: bool = False
    stored: tuple[int, ...] | None = None
    embd: float = 1.0
    qk: float = 1.5
    positions: bool = False
    opaque: bool = False
    recurrent: bool = False
    sinks: bool = False
    mixes: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.variant}" if self.variant else self.arch

    def metadata(self) -> dict[str, Value]:
        values = {**COMMON, **(MOE if self.moe else {}), "block_count": self.layers, **self.keys}
        if self.nextn:
            values |= {"block_count": self.layers + self.nextn, "nextn_predict_layers": self.nextn}
            values |= {key: [*value, *value[-self.nextn :]] for key, value in self.keys.items() if isinstance(value, list) and len(value) == self.layers}
        own = {"general.architecture": self.arch}
        return own | {k if k.startswith(("general.", "tokenizer.", "xielu.")) else f"{self.arch}.{k}": v for k, v in values.items()}


XIELU: dict[str, Value] = {"xielu.alpha_p": 0.8, "xielu.alpha_n": 0.8, "xielu.beta": 0.5, "xielu.eps": -1e-6}
GRANITE: dict[str, Value] = {"logit_scale": 2.0, "residual_scale": 0.5, "embedding_scale": 2.0, "attention.scale": 0.125}
SWA: dict[str, Value] = {"attention.sliding_window": N_SWA, "attention.sliding_window_pattern": 2}  # every second layer is full
SWA_ARRAY: dict[str, Value] = {"attention.sliding_window": N_SWA, "attention.sliding_window_pattern": [1, 0, 1, 0]}

MROPE: dict[str, Value] = {"rope.dimension_sections": [8, 12, 12, 0]}
SSM: dict[str, Value] = {"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 8, "ssm.group_count": 2}
DELTA: dict[str, Value] = {**SSM, "ssm.inner_size": 256, "ssm.state_size": 64, "ssm.time_step_rank": 4, "full_attention_interval": 2}
LORA: dict[str, Value] = {"attention.q_lora_rank": 32, "attention.kv_lora_rank": 32}

MLA: dict[str, Value] = {
    "attention.q_lora_rank": 32, "attention.kv_lora_rank": 64, "attention.key_length": 96, "attention.value_length": 64,
    "attention.key_length_mla": 48, "attention.value_length_mla": 32, "rope.dimension_count": 32, "attention.head_count_kv": 1,
}  # fmt: skip

# Served architectures: one row a case.
SERVED = [
    Tiny("llama"),
    Tiny("llama", moe=True, variant="moe"),
    Tiny("falcon"),
    Tiny("baichuan"),
    Tiny("gpt2", positions=True),
    Tiny("gptneox", {"use_parallel_residual": True, "rope.dimension_count": 16}),
    Tiny("starcoder", positions=True),
    Tiny("starcoder2"),
    Tiny("stablelm", {"rope.dimension_count": 16}),
    Tiny("qwen"),
    Tiny("qwen2"),
    Tiny("qwen2moe", moe=True),
    Tiny("qwen3"),
    Tiny("qwen3moe", moe=True),
    Tiny("phi2", {"rope.dimension_count": 32}),
    Tiny("phi3"),
    Tiny("phimoe", moe=True),
    Tiny("plamo"),
    Tiny("codeshell"),
    Tiny("orion"),
    Tiny("internlm2"),
    Tiny("minicpm", embd=1 / 12),
    Tiny("gemma", embd=1 / 16),
    Tiny("xverse"),
    Tiny("command-r", {"logit_scale": 0.0625}),
    Tiny("dbrx", {"attention.clamp_kqv": 8.0}, moe=True),
    Tiny("olmo"),
    Tiny("olmoe", {"attention.head_count_kv": N_HEAD}, moe=True),
    Tiny("arctic", moe=True),
    Tiny("deepseek", moe=True),
    Tiny("chatglm", {"rope.dimension_count": 32}),
    Tiny("glm4", {"rope.dimension_count": 32}),
    Tiny("bitnet"),
    Tiny("jais2"),
    Tiny("nemotron", {"rope.dimension_count": 32}),
    Tiny("exaone"),
    Tiny("granite", GRANITE),
    Tiny("granitemoe", GRANITE, moe=True),
    Tiny("bailingmoe", moe=True),
    Tiny("dots1", {"attention.head_count_kv": N_HEAD}, moe=True),
    Tiny("arcee"),
    Tiny("ernie4_5"),
    Tiny("ernie4_5-moe", {"interleave_moe_layer_step": 1}, moe=True),
    Tiny("hunyuan-moe", moe=True),
    Tiny("hunyuan-dense"),
    Tiny("smollm3", layers=4),
    Tiny("seed_oss"),
    Tiny("grovemoe", {"expert_chunk_feed_forward_length": 32, "expert_group_scale": 0.05, "experts_per_group": 2}, moe=True),
    Tiny("apertus", XIELU),
    Tiny("hrm_text", {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2}, layers=6),
    Tiny("minimax-m2", moe=True),
    Tiny("pangu-embedded"),
    Tiny("mistral3"),
    Tiny("maincoder"),
    Tiny("talkie", {"logit_scale": 2.0}),
    Tiny("nanbeige"),
    # positions of several dimensions, here of text
    Tiny("qwen2vl", MROPE),
    Tiny("qwen3vl", MROPE),
    Tiny("qwen3vlmoe", MROPE, moe=True),
    Tiny("paddleocr", MROPE),
    Tiny("hunyuan_vl", MROPE),
    Tiny("glm4", {**MROPE, "rope.dimension_count": 64}, variant="vision"),
    # trailing prediction layers
    Tiny("glm4moe", {"rope.dimension_count": 32}, moe=True, nextn=1, stored=(0, 1)),
    Tiny("glm4moe", MROPE, moe=True, nextn=1, stored=(0, 1), variant="vision"),
    Tiny("bailingmoe2", moe=True),
    Tiny("hy_v3", moe=True, nextn=1, stored=(0, 1)),
    # keys and values of different sizes, keys that are rotated in part
    Tiny("minicpm3", {**LORA, "attention.key_length": 64, "attention.value_length": 32, "rope.dimension_count": 32, "attention.head_count_kv": N_HEAD},
         opaque=True),
    Tiny("deepseek2", {**LORA, "attention.key_length": 64, "attention.value_length": 32, "rope.dimension_count": 32, "attention.head_count_kv": N_HEAD},
         layers=3, moe=True),
    # latent attention
    Tiny("deepseek2", MLA, layers=3, moe=True, variant="latent"),
    Tiny("mistral4", MLA, layers=3, moe=True),
    Tiny("deepseek2-ocr", {"attention.head_count_kv": N_HEAD}, moe=True),
    # layers without attention
    Tiny("deci", {"attention.head_count": [4, 0, 4], "attention.head_count_kv": [2, 0, 2], "feed_forward_length": [128, 128, 128]}, layers=3, stored=(0, 2)),
    # recurrent layers beside attention
    Tiny("qwen35", {**DELTA, **MROPE}, layers=4, stored=(1, 3), recurrent=True),
    Tiny("qwen35moe", {**DELTA, **MROPE}, layers=4, moe=True, stored=(1, 3), recurrent=True),
    Tiny("qwen3next", DELTA, layers=4, moe=True, stored=(1, 3), recurrent=True),
    Tiny("nemotron_h", {**SSM, "attention.head_count_kv": [0, 2, 0, 0, 2], "feed_forward_length": [0, 0, N_FF, 0, 0]}, layers=5, stored=(1, 4), recurrent=True),
    Tiny("nemotron_h_moe", {**SSM, "attention.head_count_kv": [0, 2, 0, 0, 2], "feed_forward_length": [0, 0, N_FF, 0, 0]}, layers=5, moe=True,
         stored=(1, 4), recurrent=True),
    Tiny("granitehybrid", {**SSM, **GRANITE, "attention.head_count_kv": [0, 2, 0, 2]}, layers=4, stored=(1, 3), recurrent=True),
    Tiny("lfm2", {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2, 0, 2]}, layers=4, stored=(1, 3), recurrent=True),
    Tiny("lfm2moe", {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2, 0, 2]}, layers=4, moe=True, stored=(1, 3), recurrent=True),
    Tiny("jamba", {**SSM, "attention.head_count_kv": [0, 2, 0, 2]}, layers=4, moe=True, stored=(1, 3), recurrent=True),
    Tiny("plamo2", {**SSM, "ssm.group_count": 0, "attention.head_count_kv": [0, 2, 0, 2]}, layers=4, stored=(1, 3), recurrent=True,
         mixes=True),
    Tiny("falcon-h1", SSM, recurrent=True),
    Tiny("minimax-01", {"full_attention_interval": 2, "residual_scale": 1.0}, layers=4, moe=True, stored=(1, 3), recurrent=True),
    # sliding-window and full attention mixed
    Tiny("gemma2", SWA, layers=4, stored=(1, 3)),
    Tiny("gemma3", SWA, layers=4, stored=(1, 3)),
    Tiny("gemma3", variant="full"),
    Tiny("olmo2", SWA, layers=4, stored=(1, 3)),
    Tiny("olmo2", variant="full"),
    Tiny("mellum", SWA, layers=4, moe=True, stored=(1, 3)),
    Tiny("plamo3", SWA, layers=4, stored=(1, 3)),
    Tiny("laguna", SWA, layers=4, moe=True, stored=(0, 2)),
    Tiny("spark2_5", SWA_ARRAY, layers=4, stored=(1, 3)),
    Tiny("laguna", moe=True, variant="full"),
    Tiny("cohere2", {**SWA, "logit_scale": 0.0625}, layers=4, stored=(1, 3)),
    Tiny("cohere2moe", {**SWA, "logit_scale": 0.0625}, layers=4, moe=True, stored=(0, 2)),
    Tiny("exaone4"),
    Tiny("exaone4", {**SWA, "embedding_length": 64, "feed_forward_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1}, layers=64, stored=tuple(range(1, 64, 2)), variant="swa"),
    Tiny("exaone-moe", SWA, layers=4, moe=True, stored=(1, 3)),
    Tiny("maple", {**SWA_ARRAY, "swiglu_clamp_exp": 7.0}, layers=4, moe=True, stored=(1, 3)),
    Tiny("muse-glimmer", {**SWA_ARRAY, "logit_scale": 2.0}, layers=4, stored=(1, 3)),
    Tiny("afmoe", SWA, layers=4, moe=True, stored=(1, 3)),
    Tiny("smallthinker", SWA, layers=4, moe=True, stored=(0, 2)),
    Tiny("smallthinker", moe=True, variant="full"),
    Tiny("llama4", {"interleave_moe_layer_step": 2}, layers=4, moe=True, stored=(3,)),
    # learned attention sinks
    Tiny("gpt-oss", {**SWA, "rope.dimension_count": 64}, layers=4, moe=True, stored=(1, 3), sinks=True),
    Tiny("granite_swa", {**SWA_ARRAY, **GRANITE}, layers=4, stored=(1, 3), sinks=True),
    Tiny("mimo2", {**SWA_ARRAY, "attention.key_length": 64, "attention.value_length": 32, "rope.dimension_count": 32,
                   "attention.head_count_kv": [4, 2, 4, 2]}, layers=4, moe=True, stored=(1, 3), sinks=True),
    Tiny("step35", {**SWA_ARRAY, "attention.head_count": [8, 4, 8, 4], "attention.head_count_kv": [4, 2, 4, 2], "attention.key_length": 64,
                    "attention.value_length": 64}, layers=4, moe=True, stored=(1, 3)),
    Tiny("gemma4", {**SWA_ARRAY, "embedding_length_per_layer_input": 0, "attention.shared_kv_layers": 0, "attention.head_count_kv": [2, 1, 2, 1],
                    "attention.key_length": 128, "attention.value_length": 128, "attention.key_length_swa": 64, "attention.value_length_swa": 64,
                    "rope.dimension_count": 128, "rope.dimension_count_swa": 64, "rope.freq_base_swa": 1e4}, layers=4, stored=(1, 3), embd=1 / 16, qk=0.5),
    Tiny("gemma4", {**SWA_ARRAY, "embedding_length_per_layer_input": 32, "attention.shared_kv_layers": 0, "attention.key_length": 512,
                    "attention.value_length": 512, "attention.key_length_swa": 256, "attention.value_length_swa": 256, "rope.dimension_count": 512,
                    "rope.dimension_count_swa": 256}, layers=4, stored=(1, 3), embd=1 / 16, qk=0.25, variant="512"),
    Tiny("step35", SWA_ARRAY, layers=4, moe=True, nextn=1, stored=(1, 3), variant="nextn"),
]
# What refused architectures ask for before the budgets are looked at, all together.
REFUSED: dict[str, Value] = {
    **MOE, **SWA_ARRAY, **GRANITE, "rope.dimension_sections": [8, 12, 12, 0], "interleave_moe_layer_step": 2, "features_length": N_EMBD,
    "attention.relative_buckets_count": 8, "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32, "attention.key_length_mla": 48,
    "attention.value_length_mla": 32, "attention.key_length_swa": 64, "attention.value_length_swa": 64, "rope.dimension_count": 32,
    "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0, "shortconv.l_cache": 3, "wkv.head_size": 64,
    "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 4, "ssm.group_count": 2,
    "attention.indexer.head_count": 2, "attention.indexer.key_length": 64, "attention.indexer.top_k": 8, "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1, "attention.indexer.kpool": 4, "posnet.embedding_length": N_EMBD, "posnet.block_count": 1,
    "convnext.embedding_length": N_EMBD, "convnext.block_count": 1, "kda.head_dim": 64, "kda.safe_gate": True, "kda.gate_lower_bound": -5.0,
    "hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6, "hyper_connection.sinkhorn_iterations": 2, "full_attention_interval": 2,
    "time_mix_extra_dim": 16, "time_decay_extra_dim": 16, "attention.max_alibi_bias": 8.0, "rope.scaling.yarn_log_multiplier": 0.1,
    "attention.output_group_count": 4, "attention.output_lora_rank": 16, "attention.compress_ratios": [0, 0, 4, 16],
    "attention.compress_rope_freq_base": 1e4, "hash_layer_count": 0, "swiglu_clamp_exp": 10.0, "activation.situ_beta": 4.0,
    "hyper_connection.magnitude": 2.0, "attention.decay_lora_rank": 16, "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 16, "attention.gate_lora_rank": 16, "attention.group_norm_epsilon": 1e-5,
    "attention.group_norm_groups": 4, "router_layer": 3,
}  # fmt: skip

REFUSED_KEYS: dict[str, dict[str, Value]] = {
    "deci": {"rope.dimension_count": 64}, "llama-embed": {"rope.dimension_count": 64}, "kimi-k3": {"attn_res.block_size": 12, "activation.situ_linear_beta": 25.0},
    "hy_v4": {"attention.indexer.types": [1, 0, 1, 0]}, "dots3note": {"attention.kv_lora_rank_swa": 32}, "deepseek4": {"expert_gating_func": 4},
    "qwen4exp": {"hyper_connection.low_rank": 8},
}  # fmt: skip

# Budgets of a model of four layers of two heads, as keys of a file.
BUDGETS: dict[str, Value] = {
    "tca.version": 1, "tca.block_size": 16, "tca.group_size": 64, "tca.window": 48, "tca.sinks": 16, "tca.metric": "key-diff",
    "tca.keep_counts": [1, 16], "tca.configs": [2, 2], "tca.head_config": [0] * 8, "tca.kept_fraction": 0.5,
}  # fmt: skip

BY_NAME = {tiny.name: tiny for tiny in SERVED}


class _Gguf:
    """gguf_* calls of ggml, which llama-cpp-python does not declare."""

    def __init__(self) -> None:
        folder = llama.lib_dir()
        path = next(folder.glob("*ggml-base*"))
        self.lib = ctypes.CDLL(str(path))
        self.lib.gguf_init_empty.restype = ctypes.c_void_p
        for name in ("gguf_set_val_u32", "gguf_set_val_f32", "gguf_set_val_bool", "gguf_set_val_str", "gguf_set_arr_data", "gguf_free"):
            getattr(self.lib, name).restype = None
        for name in ("ggml_nbytes",):
            getattr(self.lib, name).restype = ctypes.c_size_t
        self.lib.ggml_get_name.restype = ctypes.c_char_p

    def metadata(self, values: dict[str, Value]) -> ctypes.c_void_p:
        """A gguf_context; the caller frees it."""
        context = ctypes.c_void_p(self.lib.gguf_init_empty())
        for key, value in values.items():
            name = key.encode()
            if isinstance(value, bool):
                self.lib.gguf_set_val_bool(context, name, ctypes.c_bool(value))
            elif isinstance(value, int):
                self.lib.gguf_set_val_u32(context, name, ctypes.c_uint32(value))
            elif isinstance(value, float):
                self.lib.gguf_set_val_f32(context, name, ctypes.c_float(value))
            elif isinstance(value, str):
                self.lib.gguf_set_val_str(context, name, value.encode())
            else:
                floats = isinstance(value[0], float)
                array = ((ctypes.c_float if floats else ctypes.c_int32) * len(value))(*value)
                self.lib.gguf_set_arr_data(context, name, 6 if floats else 5, array, ctypes.c_size_t(len(value)))
        return context


class _Tensor(ctypes.Structure):
    """The head of a ggml_tensor, up to its shape."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


def _values(name: str, shape: tuple[int, ...], seed: int, tiny: Tiny, mute: bool = False) -> np.ndarray:
    """Weights of a tensor by its name; shape as in numpy, the last dimension is what a matrix multiplies. mute: attention and
    recurrent layers add nothing."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if mute and kind in ("attn_output", "ssm_out", "shortconv") and name.endswith(".weight"):
        return np.zeros(shape)
    if kind == "rope_freqs" or kind.startswith("rope_factors"):
        return np.ones(shape)
    if kind == "ssm_a":
        return -np.abs(rng.normal(0.5, 0.2, shape))
    if "norm" in kind and name.endswith(".weight"):
        return np.full(shape, tiny.qk if kind in ("attn_q_norm", "attn_k_norm") else 1.0)
    if kind in ("ssm_d", "layer_output_scale", "attn_scale", "ffn_scale") or name.endswith(".scale"):
        return np.ones(shape)
    if kind == "attn_sinks":
        return rng.normal(0, 1, shape)
    if len(shape) == 1 or name.endswith(".bias"):
        return rng.normal(0, 0.02, shape)
    if kind == "token_embd":
        return rng.normal(0, tiny.embd, shape)
    if kind == "position_embd":
        return rng.normal(0, 0.3, shape)
    return rng.normal(0, (1.5 if kind in ("attn_q", "attn_k", "attn_qkv", "attn_q_b") else 1.0) / np.sqrt(shape[-1]), shape)


class TinyModel:
    """A llama_model of random weights, the same for the same row and seed. mute: attention and recurrent layers add nothing.
    Raises RuntimeError
    with llama.cpp's log."""

    _log: Any = None

    def __init__(self, tiny: Tiny, seed: int = 3, extra: dict[str, Value] | None = None, keep_tensors: bool = False,
                 mute: bool = False) -> None:  # fmt: skip
        self.tiny, self.lines = tiny, []
        self.tensors: dict[str, np.ndarray] | None = {} if keep_tensors else None
        C = self.C = llama.load().llama_cpp
        gguf = _Gguf()

        def receive(_level: int, text: bytes, _: object) -> None:
            self.lines.append(text.decode("utf-8", "replace"))

        def fill(address: Any, _: object) -> None:
            tensor = _Tensor.from_address(address)
            name = gguf.lib.ggml_get_name(ctypes.c_void_p(address)).decode()
            shape = tuple(int(n) for n in reversed(tensor.ne))
            while len(shape) > 1 and shape[0] == 1:
                shape = shape[1:]
            values = np.ascontiguousarray(_values(name, shape, seed, tiny, mute), np.float32)
            size = gguf.lib.ggml_nbytes(ctypes.c_void_p(address))
            assert tensor.type == 0 and values.nbytes == size, (name, shape, size)
            gguf.lib.ggml_backend_tensor_set(ctypes.c_void_p(address), values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0), ctypes.c_size_t(size))
            if self.tensors is not None:
                self.tensors[name] = values

        log = C.llama_log_callback(receive)

        def listen() -> None:
            C.llama_log_set(log, ctypes.c_void_p(0))
            TinyModel._log = log  # of the class: the library keeps it

        listen()
        params = C.llama_model_default_params()
        if tiny.nextn:
            # llama.cpp looks for the tensors of prediction layers in a file; one without them is what conversion --no-mtp writes
            trunk = TinyModel(replace(tiny, nextn=0), seed, keep_tensors=True)
            trunk.close()
            trunk.tiny, self.tensors = tiny, trunk.tensors
            listen()
            with tempfile.TemporaryDirectory() as folder:
                self.handle = C.llama_model_load_from_file(str(trunk.write(Path(folder) / "tiny.gguf")).encode(), params)
            self._opened()
            return
        metadata = gguf.metadata({**tiny.metadata(), **(extra or {})})
        try:
            self.handle = C.llama_model_init_from_user(metadata, C.llama_model_set_tensor_data_t(fill), None, params)
        finally:
            gguf.lib.gguf_free(metadata)
        self._opened()

    def _opened(self) -> None:
        if not self.handle:
            raise RuntimeError("".join(self.lines[-4:]))
        self.address = ctypes.cast(self.handle, ctypes.c_void_p).value or 0

    def close(self) -> None:
        if self.handle:
            self.C.llama_model_free(self.handle)
            self.handle = None

    def set_budgets(self, budgets: Budgets | None) -> None:
        native.model_set_budgets(self.address, budgets)

    def heads(self, values: list[list[int]] | int) -> np.ndarray:
        """head_config: `values` of the stored layers [n_stored, n_head_kv] or of all of them, the others kept by llama.cpp."""
        shape = native.model_shape(self.address)
        heads = np.full((shape.n_layer, shape.n_head_kv), SLIDING, np.int32)
        heads[list(shape.stored)] = values
        return heads

    def write(self, path: Path) -> Path:
        """The same model as a file. Needs keep_tensors."""
        assert self.tensors is not None
        return write_file(path, self.tiny, self.tensors)


def write_file(path: Path, tiny: Tiny, tensors: dict[str, np.ndarray]) -> Path:
    """A model file of these tensors, f32."""
    writer = GGUFWriter(path, tiny.arch)
    for key, value in tiny.metadata().items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_array)
        add(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
