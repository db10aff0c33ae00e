"""llama.cpp through the C API that the package xllamacpp exports, and a tiny text model as GGUF.

Parameters are passed as blocks of bytes that are larger than the library's own structs: their
defaults come from the library, and nothing here depends on their layout.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Block(c.Structure):
    _fields_ = (("bytes", c.c_ubyte * 1024),)


class _Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32), ("token", c.c_void_p), ("embd", c.c_void_p), ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p), ("seq_id", c.c_void_p), ("logits", c.c_void_p),
    )  # fmt: skip


class _LoadInfo(c.Structure):
    """`common_control_vector_load_info`: strength, and a std::string of the ABI that manylinux2014
    wheels are built with, which is a pointer to its characters."""

    _fields_ = (("strength", c.c_float), ("name", c.c_char_p))


class _Vector(c.Structure):
    """A std::vector."""

    _fields_ = (("begin", c.c_void_p), ("end", c.c_void_p), ("room", c.c_void_p))


class _Loaded(c.Structure):
    """`common_control_vector_data`."""

    _fields_ = (("width", c.c_int), ("data", _Vector))


VERSION = "2026.10.11549"
"""Version of xllamacpp whose binary interface is used here."""
LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
"""llama.cpp's own reader of control vectors."""


class LlamaCpp:
    """One text model in llama.cpp."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        folder = Path(xllamacpp.__file__).parent
        self.library = lib = c.CDLL(str(next(folder.glob("xllamacpp*.so"))))
        self.silent = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *args: None)
        lib.llama_log_set(self.silent, None)
        for name, result, arguments in (
            ("llama_model_default_params", _Block, []),
            ("llama_context_default_params", _Block, []),
            ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, _Block]),
            ("llama_init_from_model", c.c_void_p, [c.c_void_p, _Block]),
            ("llama_batch_get_one", _Batch, [c.c_void_p, c.c_int32]),
            ("llama_decode", c.c_int32, [c.c_void_p, _Batch]),
            ("llama_get_logits_ith", c.c_void_p, [c.c_void_p, c.c_int32]),
            ("llama_set_adapter_cvec", c.c_int32,
             [c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32, c.c_int32, c.c_int32]),
            ("llama_free", None, [c.c_void_p]),
            (LOADER, None, [c.c_void_p, c.c_void_p]),
        ):  # fmt: skip
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        assert self.model, f"llama.cpp does not load {path}"

    def control_vector(self, path: Path) -> tuple[int, np.ndarray]:
        """(width, values) of a file, as llama.cpp's own reader returns them; width -1: refused."""
        info = _LoadInfo(1.0, str(path).encode())
        start = c.addressof(info)
        listed = _Vector(start, start + c.sizeof(info), start + c.sizeof(info))
        loaded = _Loaded()
        getattr(self.library, LOADER)(c.byref(loaded), c.byref(listed))
        if loaded.width <= 0:
            return loaded.width, np.zeros(0, dtype=np.float32)
        count = (loaded.data.end - loaded.data.begin) // 4
        values = (c.c_float * count).from_address(loaded.data.begin)
        return loaded.width, np.array(values, dtype=np.float32)

    def logits(
        self,
        ids: Sequence[int],
        vocabulary: int,
        vector: tuple[int, np.ndarray] | None = None,
        layers: int = 0,
    ) -> np.ndarray:
        """float32 [vocabulary]: logits behind the last token, under a control vector."""
        lib = self.library
        context = lib.llama_init_from_model(self.model, lib.llama_context_default_params())
        if vector is not None:
            width, values = vector
            done = lib.llama_set_adapter_cvec(
                context, values.ctypes.data, values.size, width, 1, layers - 1
            )
            assert done == 0
        tokens = (c.c_int32 * len(ids))(*ids)
        batch = lib.llama_batch_get_one(c.addressof(tokens), len(ids))
        assert lib.llama_decode(context, batch) == 0
        start = lib.llama_get_logits_ith(context, -1)
        logits = np.array((c.c_float * vocabulary).from_address(start), dtype=np.float32)
        lib.llama_free(context)
        return logits


def write_llama(model: Any, path: Path) -> None:
    """A transformers Llama text model as GGUF in float32, with the biases of its MLP."""
    from gguf import GGUFWriter

    config, state = model.config, model.state_dict()
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def put(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, tensor.float().contiguous().numpy())

    def interleaved(weight: torch.Tensor, n: int) -> torch.Tensor:
        """Rows of a projection in the order of llama.cpp's rotary embedding."""
        rows = weight.reshape(n, 2, weight.shape[0] // n // 2, *weight.shape[1:])
        return rows.swapaxes(1, 2).reshape(weight.shape)

    put("token_embd.weight", state["model.embed_tokens.weight"])
    put("output_norm.weight", state["model.norm.weight"])
    put("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        start, block = f"model.layers.{layer}.", f"blk.{layer}."
        put(f"{block}attn_norm.weight", state[f"{start}input_layernorm.weight"])
        put(f"{block}ffn_norm.weight", state[f"{start}post_attention_layernorm.weight"])
        attention = f"{start}self_attn."
        put(f"{block}attn_q.weight", interleaved(state[f"{attention}q_proj.weight"], heads))
        put(f"{block}attn_k.weight", interleaved(state[f"{attention}k_proj.weight"], kv))
        put(f"{block}attn_v.weight", state[f"{attention}v_proj.weight"])
        put(f"{block}attn_output.weight", state[f"{attention}o_proj.weight"])
        for part in ("gate", "up", "down"):
            for kind in ("weight", "bias"):
                key = f"{start}mlp.{part}_proj.{kind}"
                if key in state:
                    put(f"{block}ffn_{part}.{kind}", state[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
