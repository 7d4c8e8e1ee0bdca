"""Fused kernels in place of a model's norms, activations, rotary positions and residual additions, in passes on CUDA.

No modeling file is copied and no class is named. A module is recognised by its parts, and by computing what the kernel
computes: every kind of module is compared with the kernels on random numbers, and the whole model on a short text, when a
target is made.

The kernels serve plain decoding and passes over trees alike, and no row of theirs depends on the number of rows. Rotary
positions equal the model's own bit for bit; norms and activations may differ from them in the last bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medhead.core.tree import TokenTree
from medhead.errors import one_line
from medhead.model.attention import is_running
from medhead.model.eval_mode import eval_mode
from medhead.model.merged_linear import MergedLinear, can_merge
from medhead.model.own_code import global_names, global_value, replaced_forwards, with_globals

if TYPE_CHECKING:
    from medhead.model.target import Target

Forward = Callable[..., Any]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # share of the largest number
_ROWS = (1, 5)  # of the samples
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_READ = {"act_fn", "post_attention_layernorm"}  # parts whose forwards are not called
_ROPE = "apply_rotary_pos_emb"  # the name in modeling files


class FusedModules:
    """The modules of a model that fused kernels serve.

    Args:
        model: of transformers.
        head_dims: sizes of the heads of all keys that are cached.
        enabled: None uses the kernels on CUDA where Triton is installed. True asks for them on a CPU too (interpreted), and
            for q/k/v and gate/up as one product each, which changes the model's parameters, see `MergedLinear`.

    Attributes:
        forwards: the forwards that replace those of modules.
    """

    def __init__(self, model: nn.Module, head_dims: set[int], enabled: bool | None = None) -> None:
        self.forwards: dict[nn.Module, Forward] = {}
        self._parts: dict[nn.Module, dict[str, Any]] = {}  # of layers and MLPs, as they were checked
        self._merged: list[tuple[nn.Module, MergedLinear]] = []
        weight = next(model.parameters(), None)
        if enabled is False or weight is None or weight.dtype not in TOLERANCE or find_spec("triton") is None:
            return
        if enabled is None and (weight.device.type != "cuda" or torch.version.hip is not None):
            return
        self._norms: dict[nn.Module, tuple[float, bool]] = {}
        self._known: dict[Any, Any] = {}  # by kind of module: what was found
        own = [module for module in model.modules() if _is_plain(module)]
        if enabled:
            self._merged = [(module, MergedLinear(layers)) for module in own if (layers := _mergeable(module))]
        with torch.no_grad(), eval_mode(model):
            for module in own:
                self._add_norm(module)
            for module in own:
                self._add(module, head_dims)
        for _, group in self._merged:
            self.forwards |= group.forwards()

    @classmethod
    def of(cls, target: Target, enabled: bool | None) -> FusedModules:
        """Return the modules of a target's model; none where layers hold states, read masks, or are split over processes."""
        if target.state_layers is not None or target.dense_masks or target.shards is not None:
            enabled = False
        return cls(target.model, {key.dim for key, _ in target.layout.layers.values()}, enabled)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the forwards of modules inside the context, for the passes of targets without gradients."""
        served = self._served()
        merged = [group for _, group in self._merged if group.layers[0] in served]
        for group in merged:
            group.refresh()
        try:
            with replaced_forwards({one: partial(_in_passes, forward, one.forward) for one, forward in served.items()}):
                yield
        finally:
            for group in merged:
                group.release()

    def _served(self) -> dict[nn.Module, Forward]:
        """Return the forwards for modules that are as they were checked: adapters and hooks may come later."""
        left = {
            module
            for module, parts in self._parts.items()
            if module._modules != parts or not all(_is_plain(parts[name]) for name in _READ & parts.keys())
        }
        for module, group in self._merged:
            if _mergeable(module) != group.layers:
                left |= set(group.layers)
        return {
            one: forward for one, forward in self.forwards.items() if one not in left and "forward" not in one.__dict__
        }

    def check(self, target: Target) -> None:
        """Compare a pass of the target (not active) with one without the kernels; use none, with a warning, if they differ."""
        if not self.forwards:
            return
        try:
            fused, kept, self.forwards = _logits(target), self.forwards, {}
            own = _logits(target)
            allowed, found = TOLERANCE[target.dtype] * float(own.abs().max()), float((fused - own).abs().max())
            if found <= allowed:
                self.forwards = kept
                return
            reason = f"logits differ by {found:.3g}, allowed {allowed:.3g}"
        except Exception as error:  # whatever Triton throws, the model's own modules work
            reason = one_line(f"{type(error).__name__}: {error}", 160)
        self.forwards = {}
        warnings.warn(f"fused kernels do not serve {target.name}, which is slower: {reason}", stacklevel=3)

    # ---------------------------------------------------------------- kinds of modules

    def _find(self, module: nn.Module, key: Any, find: Callable[[], Any]) -> Any:
        """Return what `find` says of the first module of a kind; None where it fails."""
        key = type(module), key
        if key not in self._known:
            try:
                self._known[key] = find()
            except Exception:  # a module with another signature, or a kernel that does not compile
                self._known[key] = None
        return self._known[key]

    def _add_norm(self, module: Any) -> None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float) or module._modules or set(module._parameters) != {"weight"}:
            return
        weight = module.weight
        if (
            weight.ndim == 1
            and (offset := self._find(module, len(weight), lambda: _norm_offset(module, eps))) is not None
        ):
            self._norms[module] = eps, offset
            self.forwards[module] = partial(_norm, module, eps, offset)

    def _add(self, module: Any, head_dims: set[int]) -> None:
        parts = set(module._modules)
        if parts == _MLP and _is_plain(module.act_fn):
            kind = self._find(module, module.gate_proj.out_features, lambda: _mlp_kind(module))
            if kind is not None:
                self.forwards[module], self._parts[module] = partial(_mlp, module, kind), dict(module._modules)
        elif parts == _LAYER:
            norms = [self._norms.get(norm) for norm in (module.input_layernorm, module.post_attention_layernorm)]
            if None not in norms and _is_plain(module.self_attn) and _is_plain(module.mlp):
                added: Forward = partial(_layer, module, *norms[1])  # type: ignore[misc]
                if self._find(module, None, lambda: _is_layer(module, added)):
                    self.forwards[module], self._parts[module] = added, dict(module._modules)
        elif "q_proj" in parts and len(head_dims) == 1:
            forward = _attention_forward(module)
            if forward is not None and self._find(module, None, lambda: _is_rope(module, *head_dims)):
                self.forwards[module] = forward


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module's forward is that of its class and no hook sees its calls."""
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    return "forward" not in module.__dict__ and not hooks and not hasattr(module, "_hf_hook")


def _mergeable(module: Any) -> list[nn.Linear]:
    """Return the linear layers of a module that are given one input, empty where they cannot be merged."""
    names = ("gate_proj", "up_proj") if set(module._modules) == _MLP else ("q_proj", "k_proj", "v_proj")
    layers = [getattr(module, name, None) for name in names]
    return layers if all(map(_is_plain_linear, layers)) and can_merge(layers) else []  # type: ignore[arg-type, return-value]


def _is_plain_linear(layer: Any) -> bool:
    return type(layer) is nn.Linear and _is_plain(layer)


def _in_passes(forward: Forward, own: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run `forward` in passes of this thread over a `TreeCache`, else the module's own."""
    return (forward if is_running() and not torch.is_grad_enabled() else own)(*args, **kwargs)


# ---------------------------------------------------------------- what replaces the forwards


def _norm(module: Any, eps: float, offset: bool, x: Tensor) -> Tensor:
    from medhead_kernels import fused_ops

    return fused_ops.rms_norm(x, module.weight, eps, offset)


def _mlp(module: Any, kind: str, x: Tensor) -> Tensor:
    from medhead_kernels import fused_ops

    return module.down_proj(fused_ops.act_mul(module.gate_proj(x), module.up_proj(x), kind))


def _layer(module: Any, eps: float, offset: bool, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a layer that adds attention, then MLP, each after its norm; the first sum is part of the second norm."""
    from medhead_kernels import fused_ops

    attended = module.self_attn(module.input_layernorm(hidden_states), *args, **kwargs)[0]
    weight = module.post_attention_layernorm.weight
    normed, total = fused_ops.add_rms_norm(attended, hidden_states.contiguous(), weight, eps, offset)
    return total + module.mlp(normed)


def _attention_forward(module: Any) -> Forward | None:
    """Return an attention's own forward that leaves the rotation to the cache; None if it does other things with keys."""
    used = global_names(module)
    if _ROPE not in used or "update" not in used or used & {"cat", "split", "chunk"}:
        return None
    return with_globals(module, {_ROPE: partial(_defer_rope, global_value(module, _ROPE))})


def _defer_rope(
    own: Forward, query: Tensor, key: Any, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as they are; `TreeCache.update` rotates both as it writes the keys."""
    plain = cos.ndim == 3 and cos.shape[-1] == query.shape[-1] == key.shape[-1] and not args and not kwargs
    if not plain or not query.dtype == key.dtype == cos.dtype or query.stride(-1) != 1 or key.stride(-1) != 1:
        return own(query, key, cos, sin, *args, **kwargs)
    key.medhead_rope = query, cos, sin
    return query, key


# ---------------------------------------------------------------- checks


def _samples(like: Tensor, size: int) -> Iterator[Tensor]:
    """Yield random hidden states `[1, rows, size]` of a weight's dtype and device, the first rows alike."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1, max(_ROWS), size, generator=generator)
    for rows in _ROWS:
        yield numbers[:, :rows].to(like)


def _agree(forward: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor], like: Tensor, size: int) -> bool:
    """Return whether both give nearly the same, and `forward` gives the same bits for every number of rows."""
    found = []
    for x in _samples(like, size):
        out, expected = forward(x), own(x)
        if out.shape != expected.shape or out.dtype != expected.dtype:
            return False
        error = float((out - expected).abs().max())
        if not error <= TOLERANCE[like.dtype] * float(expected.abs().max()):
            return False
        found.append(out)
    return torch.equal(found[0][:, :1], found[1][:, :1])


def _norm_offset(module: Any, eps: float) -> bool | None:
    """Return whether 1 is added to the weights of a norm; None for a module of another kind."""
    weight = module.weight
    fits = (offset for offset in (False, True)
            if _agree(partial(_norm, module, eps, offset), module.forward, weight, len(weight)))  # fmt: skip
    return next(fits, None)


def _mlp_kind(module: Any) -> str | None:
    """Return the activation of a gated MLP, None for another one."""
    from medhead_kernels.act_mul import ACTIVATIONS, act_mul

    weight, size = module.gate_proj.weight, module.gate_proj.out_features
    both = torch.stack([*next(_samples(weight, 4 * size))[0].view(4, 1, size)])

    def agrees(kind: str) -> bool:
        """Compare the activation alone, whose rows are independent, and the MLP, whose products are the model's own."""
        gate = both * 3
        expected = module.act_fn(gate)
        error = float((act_mul(gate, torch.ones_like(gate), kind) - expected).abs().max())
        x = next(_samples(weight, module.gate_proj.in_features))
        whole = module.forward(x)
        difference = float((_mlp(module, kind, x) - whole).abs().max())
        allowed = TOLERANCE[weight.dtype]
        return error <= allowed / 10 * float(expected.abs().max()) and difference <= allowed * float(whole.abs().max())

    return next(filter(agrees, ACTIVATIONS), None)


def _is_layer(module: Any, forward: Forward) -> bool:
    """Return whether a layer adds attention and MLP as `_layer` does; both are stubs here."""
    weight = module.input_layernorm.weight
    attention, mlp = module.self_attn, module.mlp
    try:
        attention.forward = lambda x=None, **given: (0.5 * (given["hidden_states"] if x is None else x), None)
        mlp.forward = lambda x: 0.25 * x
        return _agree(forward, module.forward, weight, len(weight))
    finally:
        del attention.forward, mlp.forward


def _is_rope(module: Any, dim: int) -> bool:
    """Return whether a modeling file's rotation of heads is that of the kernel, bit for bit."""
    from medhead_kernels.rope_write import rope_write

    rotate = global_value(module, _ROPE)
    weight, nodes = module.q_proj.weight, 3
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    query, key = (draw(2, nodes, heads, dim).to(weight).transpose(1, 2) for heads in (4, 2))
    angles = draw(2, nodes, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(weight), angles.sin().to(weight)
    expected = rotate(query, key, cos, sin)
    keys, values = (key.new_zeros(2, 2, nodes, dim) for _ in range(2))
    rows = torch.arange(nodes, device=weight.device)[None]
    rope_write(query, key, key, cos, sin, rows, keys, values)
    return torch.equal(query, expected[0]) and torch.equal(keys, expected[1]) and torch.equal(values, key)


def _logits(target: Target) -> Tensor:
    """Return the logits of a pass over a short chain after one token."""
    tokens = torch.arange(5, device=target.device)[None] % min(target.vocab_size, target.num_embeddings)
    with torch.inference_mode(), target.active():
        cache = target.new_cache(1, 16)
        target.prefill(cache, [[1]])
        return target.verify(cache, TokenTree.chain(tokens))[0].float()
