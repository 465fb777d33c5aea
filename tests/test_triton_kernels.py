"""Every kernel's Triton version against its reference: compiled on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Row, batch, llava
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vtprune
import vtprune.kernels as kernel_package
from vtprune.errors import KernelError, ShapeError, UnknownNameError
from vtprune.kernels import Kernel, aot, guard, kernels
from vtprune.kernels.attention_rows import attention_rows
from vtprune.kernels.compact_cache import compact_cache
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.kernels.merge_tokens import merge_tokens
from vtprune.kernels.transition import transition
from vtprune.kernels.value_norms import value_norms

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of a result's dtype, whatever the inputs' is, because all sums are fp32
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
KERNELS = kernels()

needs_triton = pytest.mark.skipif(not guard.has_triton(), reason="Triton is not installed")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest number of its dtype, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def example(kernel: Kernel, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kernel.example("odd", dtype, DEVICE)


def each(value: Any, change: Any) -> Any:
    """`change` applied to a tensor, or to the tensors of a list."""
    if isinstance(value, Tensor):
        return change(value)
    return [each(v, change) for v in value] if isinstance(value, list) else value


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps of poison between them, and axes in another order in memory."""
    poison = float("nan") if tensor.is_floating_point() else 1
    gaps = torch.stack([tensor, torch.full_like(tensor, poison)], -1)
    order = (*range(tensor.dim() - 1, -1, -1), tensor.dim())
    there = gaps.permute(order).contiguous().permute(order)[..., 0]
    assert not there.is_contiguous()
    return there


def compare(kernel: Kernel, found: Any, wanted: Any) -> None:
    assert len(flat(found)) == len(flat(wanted)) > 0
    for a, b in zip(flat(found), flat(wanted), strict=True):
        if kernel.exact:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=TOLERANCE[b.dtype], atol=TOLERANCE[b.dtype])


# every kernel


def test_every_kernel_has_a_record() -> None:
    assert set(KERNELS) >= {
        "attention_rows",
        "compact_cache",
        "keep_tokens",
        "merge_tokens",
        "transition",
        "value_norms",
    }
    for name, kernel in KERNELS.items():
        assert kernel.operator == f"vtprune::{name}"
        assert kernel.run.__name__ == name


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "spread"])
@pytest.mark.parametrize("name", KERNELS)
def test_triton_equals_the_reference(name: str, layout: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]
    inputs = example(kernel, dtype)
    wanted = kernel.run(**inputs, impl="reference")
    if layout == "spread":
        inputs = {key: each(value, spread) for key, value in inputs.items()}
    before = [t.clone() for t in flat(list(inputs.values()))]
    compare(kernel, kernel.run(**inputs, impl="triton"), wanted)
    compare(kernel, kernel.run(**inputs, impl="torch"), wanted)
    for now, then in zip(flat(list(inputs.values())), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def gradients(kernel: Kernel, inputs: dict[str, Any], impl: str, run: Any = None) -> list[Tensor]:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor

    inputs = {key: each(value, leaf) if key in kernel.gradients else value for key, value in inputs.items()}
    out = [t for t in flat((run or kernel.run)(**inputs, impl=impl)) if t.is_floating_point()]
    # a sum whose gradient differs from place to place
    sum((t.float() * torch.linspace(-1, 1, t.numel(), device=t.device).reshape(t.shape)).sum() for t in out).backward()
    return [t.grad for key in kernel.gradients for t in flat(inputs[key]) if t.requires_grad]  # type: ignore[misc]


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.gradients])
def test_gradients_equal_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    kernel = KERNELS[name]
    inputs = example(kernel, dtype)
    found, torch_s, wanted = (gradients(kernel, inputs, impl) for impl in ("triton", "torch", "reference"))
    for a, c, b in zip(found, torch_s, wanted, strict=True):
        assert a.dtype == b.dtype
        largest = b.abs().max().item()
        assert largest > 1e-3
        for found_one in (a, c):
            torch.testing.assert_close(
                found_one, b, rtol=5 * TOLERANCE[a.dtype], atol=2 * TOLERANCE[a.dtype] * min(1.0, largest)
            )


# torch.compile takes seconds a kernel
ONE = [pytest.param(name, marks=() if name == "keep_tokens" else pytest.mark.slow) for name in KERNELS]


# the check reads gradients of tensors that it computed itself (torch 2.14)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_operator_passes_torch_s_own_checks(name: str) -> None:
    kernel = KERNELS[name]
    inputs = example(kernel, torch.float32)
    operands = kernel.operands(**inputs)
    wanting = tuple(
        each(value, lambda t: t.clone().requires_grad_(kernel.gradients != () and t.is_floating_point()))
        for value in operands
    )
    namespace, _, operator = kernel.operator.partition("::")
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, wanting)


@needs_triton
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("name", ONE)
def test_torch_compile_passes_through(name: str, impl: str) -> None:
    kernel = KERNELS[name]
    inputs = example(kernel, torch.float32)
    torch.compiler.reset()  # every case compiles the same line again
    run = torch.compile(lambda **given: kernel.run(**given), fullgraph=True, backend="aot_eager")
    compare(kernel, run(**inputs, impl=impl), kernel.run(**inputs, impl="reference"))
    if kernel.gradients:
        found, wanted = gradients(kernel, inputs, impl, run), gradients(kernel, inputs, "reference")
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# where Triton may run


@pytest.mark.parametrize("name", KERNELS)
def test_triton_on_a_cpu_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(guard, "_FOUND", True)
    kernel = KERNELS[name]
    with pytest.raises(KernelError, match=r'impl="triton" needs all tensors on one CUDA device, got cpu\. Move them'):
        kernel.run(**kernel.example("odd", torch.float32, "cpu"), impl="triton")


@pytest.mark.parametrize("name", KERNELS)
def test_without_triton_the_message_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_FOUND", False)
    kernel = KERNELS[name]
    inputs = example(kernel, torch.float32)
    with pytest.raises(KernelError, match=r"run `pip install triton`"):
        kernel.run(**inputs, impl="triton")
    # auto goes on without it
    compare(kernel, kernel.run(**inputs), kernel.run(**inputs, impl="reference"))


def test_auto_on_a_cpu_never_means_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launched: list[object] = []
    with guard.recording(lambda *args, **constants: launched.append(args)):
        keep_tokens([torch.zeros(1, 5, 3)], torch.tensor([[0]]))
    assert launched == []


def test_the_environment_may_name_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("VTPRUNE_KERNELS", "triton")
    with pytest.raises(KernelError, match="got cpu"):
        keep_tokens([torch.zeros(1, 5, 3)], torch.tensor([[0]]))
    (out,) = keep_tokens([torch.ones(1, 5, 3)], torch.tensor([[0]]), impl="torch")
    assert out.sum() == 3
    monkeypatch.setenv("VTPRUNE_KERNELS", "fast")
    with pytest.raises(ValueError, match="Unknown kernel implementation 'fast'"):
        keep_tokens([torch.zeros(1, 5, 3)], torch.tensor([[0]]))


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    during: list[list[torch.device]] = []

    @contextlib.contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: during.append(list(current))

    monkeypatch.setattr(torch.cuda, "device", switch)
    with FakeTensorMode():
        there = torch.empty(1, device="cuda:1")
    guard.launch(Kernel(), (1,), there, 3)
    guard.launch(Kernel(), (1,), (there, there), 3)
    guard.launch(Kernel(), (1,), torch.empty(1), 3)
    guard.launch(Kernel(), (1, 0), there)
    assert during == [[torch.device("cuda:1")], [torch.device("cuda:1")], []]


@pytest.mark.slow
def test_the_package_works_where_triton_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["triton"] = None
import vtprune, torch
from vtprune.kernels import guard, kernels
assert not guard.has_triton()
for kernel in kernels().values():
    kernel.run(**kernel.example("odd", torch.float32, "cpu"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# keep_tokens


def kept(batch: int, length: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.stack([torch.randperm(length, generator=generator)[:count] for _ in range(batch)])


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_keep_tokens_on_any_axis(dim: int, shared: bool) -> None:
    tensor = torch.rand(1 if shared else 3, 4, 5, 6, device=DEVICE)
    index = kept(3, tensor.shape[dim], 3).to(DEVICE)
    for view in (tensor, spread(tensor), tensor.to(torch.complex64), tensor > 0.5):
        (found,), (wanted,) = (keep_tokens([view], index, dim, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(found, wanted)


@needs_triton
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 1025])
def test_keep_tokens_moves_rows_of_any_width_and_start(width: int) -> None:
    memory = torch.arange(3 + 2 * 7 * width, device=DEVICE).to(torch.int16)
    tensor = memory[3:].reshape(2, 7, width)
    index = kept(2, 7, 4).to(DEVICE)
    (found,) = keep_tokens([tensor], index, impl="triton")
    assert torch.equal(found, torch.stack([tensor[b, index[b]] for b in range(2)]))


@needs_triton
def test_keep_tokens_is_one_launch_without_copies() -> None:
    states, table = torch.rand(2, 9, 12).bfloat16(), torch.rand(1, 9, 4)
    launched: list[tuple[Any, ...]] = []
    with guard.recording(lambda *args, **constants: launched.append(args)):
        strided = torch.rand(2, 3, 9, 4).transpose(1, 2)
        keep_tokens([states, table, torch.arange(9)[None], strided], kept(2, 9, 3), impl="triton")
    assert len(launched) == 1
    # the kernel was given the memory of its inputs, words of 8 bytes where they fit
    sources = launched[0][2]
    assert [s.data_ptr() for s in sources[:2]] == [states.data_ptr(), table.data_ptr()]
    assert [s.dtype for s in sources] == [torch.int64] * 4


@needs_triton
def test_keep_tokens_of_nothing() -> None:
    (none,) = keep_tokens([torch.rand(2, 5, 3)], torch.empty(2, 0, dtype=torch.long), impl="triton")
    assert none.shape == (2, 0, 3)
    (empty,) = keep_tokens([torch.rand(2, 5, 0)], kept(2, 5, 2), impl="triton")
    assert empty.shape == (2, 2, 0)
    assert keep_tokens([], kept(2, 5, 2)) == ()


# attention_rows


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("heads", "groups", "rows", "length", "width"),
    [(1, 1, 1, 1, 1), (34, 17, 1, 35, 5), (4, 1, 7, 69, 18), (1, 1, 67, 37, 8)],
    ids=["one", "heads", "grouped", "many rows"],
)
@pytest.mark.parametrize("mask", ["none", "padding", "each row"])
def test_attention_rows_of_any_shape_and_mask(
    mask: str, heads: int, groups: int, rows: int, length: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two spans a head and short steps, so that a span takes several and both are combined
    monkeypatch.setattr("vtprune.kernels.attention_rows_triton._KEYS", 16)
    monkeypatch.setattr("vtprune.kernels.attention_rows_triton._SPANS", 2)
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, heads, rows, width, generator=generator).half()
    key = torch.randn(2, length, groups, width, generator=generator).half().transpose(1, 2)
    real = None
    if mask != "none":
        real = torch.rand(2, length, generator=generator) > 0.3
        real[0] = False  # a sample that sees nothing
        key = key.masked_fill(~real[:, None, :, None], float("nan"))
    if mask == "each row" and real is not None:
        real = real[:, None] & (torch.rand(2, rows, length, generator=generator) > 0.3)
    given = [None if t is None else t.to(DEVICE) for t in (query, key, real)]
    found, wanted = (
        attention_rows(given[0], given[1], 0.3, real=given[2], impl=impl)  # type: ignore[arg-type]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-7)
    if mask != "none":
        assert (found[0] == 0).all()


@needs_triton
def test_attention_rows_reads_no_matrix_and_keys_once() -> None:
    query, key = torch.rand(1, 4, 2, 8), torch.rand(1, 2, 500, 8)
    launched: list[tuple[Any, ...]] = []
    with guard.recording(lambda *args, **constants: launched.append(args)):
        attention_rows(query, key, 0.3, real=None, impl="triton")
    assert len(launched) == 2
    owners = [[t for t in args[2:] if isinstance(t, Tensor) and t.data_ptr() == key.data_ptr()] for args in launched]
    assert [len(found) for found in owners] == [1, 0]
    largest = max(t.numel() for args in launched for t in args[2:] if isinstance(t, Tensor))
    assert largest == max(key.numel(), 4 * 2 * 500)


# merge_tokens


@needs_triton
@pytest.mark.usefixtures("poisoned")
def test_merge_tokens_sums_up_in_a_fixed_order_and_counts() -> None:
    hidden, valid = torch.randn(2, 23, 40, device=DEVICE), torch.ones(2, 23, dtype=torch.bool, device=DEVICE)
    valid[1, 20:] = False
    hidden[1, 20:] = float("nan")
    owner = (torch.arange(23, device=DEVICE) % 3).expand(2, 23)
    owner = owner.masked_fill(~valid, 2**40)
    out, totals = merge_tokens(hidden, owner, valid, totals=True, impl="triton")
    assert totals[0, :4].tolist() == [8, 8, 7, 0]
    assert totals[1].sum() == 20
    torch.testing.assert_close(out[1, 0], hidden[1, 0:20:3].mean(0))
    assert torch.equal(out[0, 3:], hidden[0, 3:])
    for impl in ("torch", "reference"):
        there = owner if impl == "torch" else owner.masked_fill(~valid, 0)
        assert torch.equal(merge_tokens(hidden, there, valid, totals=True, impl=impl)[1], totals)
    own = torch.arange(23, device=DEVICE).expand(2, 23)
    half = hidden[:1].half()
    assert torch.equal(merge_tokens(half, own[:1], valid[:1], impl="triton"), half)


@needs_triton
def test_merge_tokens_of_no_weight_keeps_its_value_and_has_its_gradient() -> None:
    grads = []
    for impl in ("triton", "torch"):
        hidden, weight = torch.ones(1, 4, 3, device=DEVICE), torch.tensor([[1.0, 3.0, 0.0, 0.0]], device=DEVICE)
        hidden[0, 1], hidden[0, 3] = 5.0, 7.0
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        valid = torch.tensor([[True, True, True, False]], device=DEVICE)
        out = merge_tokens(hidden, torch.tensor([[0, 0, 2, 0]], device=DEVICE), valid, weight, impl=impl)
        assert out[0, :, 0].tolist() == [4.0, 5.0, 1.0, 7.0]
        (out * torch.arange(1.0, 5.0, device=DEVICE)[:, None]).sum().backward()
        grads.append((hidden.grad, weight.grad))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


# compact_cache in place


def cache(dtype: torch.dtype = torch.float32, width: int = 6) -> list[Tensor]:
    return [torch.rand(2, 3, 300, width, device=DEVICE).to(dtype), torch.rand(2, 3, 300, 2, device=DEVICE).to(dtype)]


@pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "spread"])
@pytest.mark.parametrize("per_head", [False, True])
def test_compact_cache_in_place(per_head: bool, layout: str, dtype: torch.dtype, impl: str) -> None:
    tensors = cache(dtype)
    if layout == "transposed":
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    if layout == "spread":
        tensors = [spread(t) for t in tensors]
    index = kept(6, 300, 270).sort(1)[0].reshape(2, 3, 270).to(DEVICE)
    index = index if per_head else index[:, 0]
    wanted = compact_cache(tensors, index, impl="reference")
    behind = [t[:, :, 270:].clone() for t in tensors]
    found = compact_cache(tensors, index, in_place=True, impl=impl)
    for tensor, out, right, rest in zip(tensors, found, wanted, behind, strict=True):
        assert out.data_ptr() == tensor.data_ptr()
        assert torch.equal(out, right)
        assert torch.equal(tensor[:, :, 270:], rest)


@needs_triton
def test_compact_cache_in_place_passes_through_compile() -> None:
    tensors, index = cache(), kept(2, 300, 20).sort(1)[0].to(DEVICE)
    wanted = compact_cache(tensors, index, impl="reference")

    def run(key: Tensor, value: Tensor) -> Tensor:
        out = compact_cache([key, value], index, in_place=True, impl="triton")
        return out[0].sum() + out[1].sum() + key[:, :, 0].sum()

    total = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(total, sum(t.sum() for t in wanted) + wanted[0][:, :, 0].sum())
    assert torch.equal(tensors[1][:, :, :20], wanted[1])


def test_compact_cache_in_place_refuses_what_it_would_spoil() -> None:
    tensors, index = [t.cpu() for t in cache()], torch.tensor([[1, 0], [0, 1]])
    with pytest.raises(ShapeError, match=r"index\[\.\.\., m\] >= m"):
        compact_cache(tensors, index, in_place=True)
    with pytest.raises(KernelError, match="requires a gradient"):
        compact_cache([t.requires_grad_() for t in tensors], index.sort(1)[0], in_place=True)
    with pytest.raises(ShapeError, match=r"strides \[0, 0, 1, 1\]"):
        compact_cache([torch.rand(5)[None, None, :, None].expand(2, 3, 5, 1)], index.sort(1)[0], in_place=True)


def test_compact_cache_errors_name_the_values() -> None:
    tensors, index = [t.cpu() for t in cache()], torch.tensor([[0], [1]])
    with pytest.raises(ShapeError, match=r"int64 \[B, M\] or \[B, H, M\], got torch.int32 \[2, 1\]"):
        compact_cache(tensors, index.int())
    with pytest.raises(ShapeError, match=r"the same B, H and N, got \[\[2, 3, 300, 6\], \[2, 3, 299, 2\]\]"):
        compact_cache([tensors[0], tensors[1][:, :, 1:]], index)
    with pytest.raises(ShapeError, match=r"\[2, M\] or \[2, 3, M\], got \[1, 1\]"):
        compact_cache(tensors, index[:1])


# value_norms


@needs_triton
@pytest.mark.usefixtures("poisoned")
def test_value_norms_of_all_heads_read_chosen_tokens_alone() -> None:
    value = torch.randn(2, 3, 9, 7, device=DEVICE).bfloat16()
    value[:, :, 5:] = float("nan")
    column = torch.tensor([[4, 0, 2], [1, 1, 3]], device=DEVICE)
    wanted = torch.stack([value[b, :, column[b]].float().abs().sum((0, 2)) for b in range(2)])
    for impl in ("triton", "torch", "reference"):
        found = value_norms(spread(value), column, "all_heads", impl=impl)
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
        leaf = value.clone().requires_grad_()
        (grad,) = torch.autograd.grad(value_norms(leaf, column, "all_heads", impl=impl).sum(), leaf)
        assert torch.equal(grad[1, :, 1], 2 * value[1, :, 1].sign())
        assert (grad[:, :, 5:] == 0).all()


def test_value_norms_errors_name_the_values() -> None:
    value, column = torch.rand(2, 3, 9, 7), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"\[B, H, N, d\], got \[2, 3, 9\]"):
        value_norms(value[..., 0], column)
    with pytest.raises(ShapeError, match=r"int64 \[2, V\], got torch.int64 \[1, 4\]"):
        value_norms(value, column[:1])
    with pytest.raises(UnknownNameError, match=r"value norm 'mean'.*all_heads, head_mean"):
        value_norms(value, column, "mean")  # type: ignore[arg-type]


def test_transition_errors_name_the_values() -> None:
    with pytest.raises(ShapeError, match=r"\[B, N, D\], got \[2, 3, 4\] and \[2, 3, 5\]"):
        transition(torch.rand(2, 3, 4), torch.rand(2, 3, 5))


# ahead of time


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_all_compile_for_two_architectures_and_the_page_says_what_came_out(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- kernels:start -->\nold\n<!-- kernels:end -->\nafter\n", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "vtprune.kernels.aot", "--write", str(page)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    built = re.findall(r"(\d+) / (\d+) / (\d+) \|", text)
    # every row of the first table has a cell for each architecture and dtype
    assert len(built) == 4 * len(re.findall(r"_kernel` \|", text)) >= 4 * 6
    assert all(0 < int(registers) <= 255 for registers, _, _ in built)
    assert {spilled for _, _, spilled in built} == {"0"}
    ratios = [float(row.split("|")[-2]) for row in text.splitlines() if row.startswith("| `") and " / " not in row]
    assert len(ratios) == len(KERNELS)
    assert all(1.0 <= ratio < 4.0 for ratio in ratios)
    # the committed page is what this command writes, on this version of Triton
    committed = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    if text.split("Triton ")[1].split(" ")[0] == committed.split("\nTriton ")[1].split(" ")[0]:
        assert text.split("kernels:start")[1].split("kernels:end")[0] in committed


@needs_triton
def test_compiling_ahead_of_time_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1 turns the compiler off"):
        next(aot.build(80, torch.float32))
    monkeypatch.setattr(aot, "tables", lambda: "")
    (tmp_path / "page.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(KernelError, match=r"page\.md must hold <!-- kernels:start -->"):
        aot.main(["--write", str(tmp_path / "page.md")])


# the engine


@needs_triton
@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("fastv", {"keep_tokens", "attention_rows"}),
        ("pool", {"keep_tokens", "merge_tokens"}),
        pytest.param("transprune", {"keep_tokens", "attention_rows", "transition"}, marks=pytest.mark.slow),
        pytest.param("flowcut", {"keep_tokens", "attention_rows", "value_norms"}, marks=pytest.mark.slow),
    ],
)
def test_a_pruned_model_gives_the_same_on_triton(method: str, used: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava().to(DEVICE)
    inputs = {key: value.to(DEVICE) for key, value in batch(Row(), Row(2, 1, 4, 1)).items()}
    launched: set[str] = set()
    for module in pkgutil.iter_modules(kernel_package.__path__):
        if module.name.endswith("_triton"):
            there = importlib.import_module(f"vtprune.kernels.{module.name}")

            def note(*args: Any, name: str = module.name.removesuffix("_triton"), **constants: Any) -> None:
                launched.add(name)
                guard.launch(*args, **constants)

            monkeypatch.setattr(there, "launch", note)
    logits = []
    with torch.no_grad(), vtprune.prune(model, method, keep=0.7):
        for impl in ("torch", "triton"):
            monkeypatch.setenv("VTPRUNE_KERNELS", impl)
            logits.append(model(**inputs).logits)
    assert launched == used
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
