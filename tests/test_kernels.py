"""Every kernel against its reference and against a second formulation, at odd sizes, with poison in the padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtprune.errors import ShapeError, UnknownNameError
from vtprune.kernels import attention_rows as attention_rows_module
from vtprune.kernels.attention_rows import attention_rows
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.kernels.merge_tokens import merge_tokens

# dtype of the inputs, largest difference between two fp32 sums that are rounded to it
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(batch: int, length: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=generator)[:count].sort()[0] for _ in range(batch)])


# keep_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length", "count"), [(1, 1, 1), (3, 63, 20), (2, 577, 64), (1, 576, 576), (2, 5, 0)])
def test_keep_tokens_equals_reference_and_indexing(batch: int, length: int, count: int, dtype: torch.dtype) -> None:
    hidden = randn(batch, length, 6).to(dtype)
    ids = torch.arange(batch * length).reshape(batch, length)
    mask = ids % 3 == 0
    table = randn(1, length, 4, seed=1).to(dtype)
    index = kept(batch, length, count)
    tensors = (hidden, ids, mask, table)
    fast = keep_tokens(tensors, index)
    slow = keep_tokens(tensors, index, impl="reference")
    row = torch.arange(batch)[:, None]
    direct = (hidden[row, index], ids[row, index], mask[row, index], table[0][index])
    for name, a, b, c in zip(("hidden", "ids", "mask", "table"), fast, slow, direct, strict=True):
        assert a.dtype == c.dtype, name
        assert torch.equal(a, c), name
        assert torch.equal(b, c), name


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_keep_tokens_on_any_axis_of_any_layout(dim: int, shared: bool, contiguous: bool) -> None:
    shape = [1 if shared else 3, 4, 5, 6]
    length = shape[dim]
    tensor = randn(*shape) if contiguous else randn(*shape[::-1]).permute(3, 2, 1, 0)
    assert tensor.is_contiguous() == contiguous
    index = kept(3, length, 3)
    (fast,) = keep_tokens([tensor], index, dim)
    (slow,) = keep_tokens([tensor], index, dim, impl="reference")
    want = torch.stack([tensor[0 if shared else b].index_select(dim - 1, index[b]) for b in range(3)])
    assert torch.equal(fast, want)
    assert torch.equal(slow, want)


def test_keep_tokens_shared_table_stays_batch_one_for_one_sample() -> None:
    (table,) = keep_tokens([randn(1, 9, 4)], kept(1, 9, 4))
    assert table.shape == (1, 4, 4)


@pytest.mark.parametrize("contiguous", [False, True])
def test_keep_tokens_keeps_nothing_full_length_alive(contiguous: bool) -> None:
    hidden = randn(2, 100, 8) if contiguous else randn(2, 8, 100).transpose(1, 2)
    (out,) = keep_tokens([hidden], kept(2, 100, 3))
    assert out.untyped_storage().nbytes() == 2 * 3 * 8 * 4


@pytest.mark.parametrize("contiguous", [False, True])
def test_keep_tokens_backward_adds_up_copies(contiguous: bool) -> None:
    index = torch.tensor([[0, 2, 2], [4, 1, 4]])
    upstream = randn(2, 3, 3, seed=5)
    grads = []
    for impl in ("torch", "reference"):
        leaf = randn(2, 5, 3) if contiguous else randn(2, 3, 5).transpose(1, 2)
        leaf = leaf.detach().requires_grad_()
        (out,) = keep_tokens([leaf], index, impl=impl)
        out.backward(upstream)
        grads.append(leaf.grad)
    assert grads[0] is not None
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0][0, 2], upstream[0, 1] + upstream[0, 2])
    assert torch.equal(grads[0][0, 1], torch.zeros(3))


def test_keep_tokens_errors_name_the_values() -> None:
    hidden, index = randn(2, 5, 3), torch.tensor([[0], [1]])
    with pytest.raises(ShapeError, match=r"int64 \[B, M\], got torch.int32 \[2, 1\]"):
        keep_tokens([hidden], index.int())
    with pytest.raises(ShapeError, match=r"batch 1 or 3 \(the batch of index\), got 2"):
        keep_tokens([hidden], torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"same number of tokens on axis 1, got \[4, 5\]"):
        keep_tokens([hidden, randn(2, 4)], index)
    with pytest.raises(ShapeError, match=r"dim must be in \[1, 2\] for a tensor \[2, 5, 3\], got 3"):
        keep_tokens([hidden], index, 3)
    with pytest.raises(ShapeError, match=r"got 0"):
        keep_tokens([hidden], index, 0)
    with pytest.raises(IndexError):
        keep_tokens([randn(1, 5, 3)], torch.tensor([[5]]))


# attention_rows


def attention_inputs(batch: int, length: int, rows: int, dtype: torch.dtype, heads: int = 6, key_heads: int = 2):
    query = randn(batch, heads, rows, 8, seed=1).to(dtype)
    key = randn(batch, length, key_heads, 8, seed=2).to(dtype).transpose(1, 2)
    real = torch.arange(length)[None, :] >= torch.tensor([[b * (length // 3)] for b in range(batch)])
    return query, key, real


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize(("length", "rows"), [(1, 1), (63, 3), (577, 1)])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_rows_equals_reference_and_plain_softmax(
    softcap: float | None, length: int, rows: int, dtype: torch.dtype
) -> None:
    query, key, real = attention_inputs(2, length, rows, dtype)
    fast = attention_rows(query, key, 0.4, real=real, softcap=softcap)
    slow = attention_rows(query, key, 0.4, real=real, softcap=softcap, impl="reference")
    logits = query.double() @ key.double().repeat_interleave(3, dim=1).transpose(2, 3) * 0.4
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    plain = logits.masked_fill(~real[:, None, None], float("-inf")).softmax(-1).mean(1)
    assert fast.dtype == torch.float32
    # the sums are fp32 whatever the inputs are, so half precision inputs cost nothing here
    torch.testing.assert_close(fast, plain.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(slow, plain.float(), rtol=1e-5, atol=1e-7)


def test_attention_rows_in_chunks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, real = attention_inputs(2, 63, 2, torch.bfloat16)
    whole = attention_rows(query, key, 0.4, real=real)
    monkeypatch.setattr(attention_rows_module, "_CHUNK", 10)
    torch.testing.assert_close(attention_rows(query, key, 0.4, real=real), whole, rtol=1e-6, atol=0)


def test_attention_rows_reads_columns_after_the_softmax() -> None:
    query, key, _ = attention_inputs(2, 20, 3, torch.float32)
    column = torch.tensor([[3, 4, 9], [0, 19, 19]])
    full = attention_rows(query, key, 0.4, real=None)
    for impl in ("torch", "reference"):
        some = attention_rows(query, key, 0.4, real=None, column=column, impl=impl)
        assert some.shape == (2, 3, 3)
        for b in range(2):
            torch.testing.assert_close(some[b], full[b][:, column[b]])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_attention_rows_ignores_poisoned_padding(impl: str) -> None:
    query, key, real = attention_inputs(2, 9, 1, torch.float32)
    key = key.contiguous()
    real[1] = False
    real[1, 5:] = True
    clean = attention_rows(query, key, 0.4, real=real, impl=impl)
    for poison in (float("nan"), float("inf"), 1e30):
        key[1, :, :5] = poison
        assert torch.equal(attention_rows(query, key, 0.4, real=real, impl=impl), clean)
    assert (clean[1, 0, :5] == 0).all()
    torch.testing.assert_close(clean.sum(2), torch.ones(2, 1))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_attention_rows_of_a_sample_without_keys_are_zero(impl: str) -> None:
    query, key, real = attention_inputs(2, 9, 1, torch.float32)
    real[1] = False
    out = attention_rows(query, key, 0.4, real=real, impl=impl)
    assert (out[1] == 0).all()
    assert out[0].sum() > 0.99


def test_attention_rows_gradients_equal_the_reference() -> None:
    grads = []
    for impl in ("torch", "reference"):
        query, key, real = attention_inputs(2, 11, 2, torch.float32)
        query, key = query.requires_grad_(), key.detach().requires_grad_()
        attention_rows(query, key, 0.4, real=real, impl=impl).square().sum().backward()
        grads.append((query.grad, key.grad))
    for name, a, b in zip(("query", "key"), *grads, strict=True):
        assert a is not None
        assert a.abs().max() > 1e-4, name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_rows_errors_name_the_values() -> None:
    query, key, real = attention_inputs(2, 9, 1, torch.float32)
    with pytest.raises(ShapeError, match=r"multiple of key heads, got 5 and 2"):
        attention_rows(query[:, :5], key, 1.0, real=None)
    with pytest.raises(ShapeError, match=r"query \[2, 6, 1, 7\] and key \[2, 2, 9, 8\]"):
        attention_rows(query[..., :7], key, 1.0, real=None)
    with pytest.raises(ShapeError, match=r"real must be bool \[2, 9\] or \[2, 1, 9\], got torch.bool \[2, 8\]"):
        attention_rows(query, key, 1.0, real=real[:, :8])
    with pytest.raises(ShapeError, match=r"column must be int64 \[2, V\], got torch.int32 \[2, 3\]"):
        attention_rows(query, key, 1.0, real=None, column=torch.zeros(2, 3, dtype=torch.int32))


# merge_tokens


def merge_inputs(batch: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = randn(batch, 5, length).to(dtype).transpose(1, 2)
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor([max(1, length - 7 * b) for b in range(batch)])
    valid = torch.arange(length)[None, :] < counts[:, None]
    owner = torch.stack([torch.randint(0, int(n), (length,), generator=generator) for n in counts])
    return hidden, owner, valid, torch.rand(batch, length, generator=generator) + 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("length", [1, 63, 577])
@pytest.mark.parametrize("weighted", [False, True])
def test_merge_tokens_equals_reference_and_one_hot(
    length: int, weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, owner, valid, weight = merge_inputs(2, length, dtype)
    share = (weight if weighted else torch.ones_like(weight)) * valid
    matrix = torch.nn.functional.one_hot(owner, length).double() * share[:, :, None].double()
    total = matrix.sum(1)[:, :, None]
    mean = matrix.transpose(1, 2) @ hidden.double() / total.clamp(min=1e-9)
    want = torch.where(total > 0, mean.to(dtype), hidden)
    for impl in ("torch", "reference"):
        out = merge_tokens(hidden, owner, valid, weight if weighted else None, impl=impl)
        assert out.dtype == dtype
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_tokens_that_own_themselves_do_not_change_a_bit(impl: str, dtype: torch.dtype) -> None:
    hidden, _, valid, _ = merge_inputs(2, 63, dtype)
    assert torch.equal(merge_tokens(hidden, torch.arange(63).expand(2, 63), valid, impl=impl), hidden)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_merge_tokens_of_nobody_and_of_no_weight_keep_their_value(impl: str) -> None:
    hidden, valid = randn(1, 4, 5), torch.ones(1, 4, dtype=torch.bool)
    owner, weight = torch.tensor([[0, 0, 2, 3]]), torch.tensor([[1.0, 3.0, 0.0, 1.0]])
    out = merge_tokens(hidden, owner, valid, weight, impl=impl)
    torch.testing.assert_close(out[0, 0], 0.25 * hidden[0, 0] + 0.75 * hidden[0, 1])
    assert torch.equal(out[0, 1:], hidden[0, 1:])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_merge_tokens_ignores_poisoned_padding(impl: str) -> None:
    hidden, owner, valid, weight = merge_inputs(2, 20, torch.float32)
    hidden = hidden.contiguous()
    clean = merge_tokens(hidden, owner, valid, weight, impl=impl)
    hidden[~valid] = float("nan")
    weight[~valid] = float("nan")
    owner[~valid] = 0
    dirty = merge_tokens(hidden, owner, valid, weight, impl=impl)
    assert torch.equal(dirty[valid], clean[valid])


def test_merge_tokens_fast_path_accepts_any_owner_in_the_padding() -> None:
    hidden, owner, valid, _ = merge_inputs(2, 20, torch.float32)
    clean = merge_tokens(hidden, owner, valid)
    assert torch.equal(merge_tokens(hidden, owner.masked_fill(~valid, 2**40), valid)[valid], clean[valid])


def test_merge_tokens_gradients_equal_the_reference() -> None:
    grads = []
    for impl in ("torch", "reference"):
        hidden, owner, valid, weight = merge_inputs(2, 20, torch.float32)
        hidden, weight = hidden.detach().requires_grad_(), weight.requires_grad_()
        merge_tokens(hidden, owner, valid, weight, impl=impl).square().sum().backward()
        grads.append((hidden.grad, weight.grad))
    for name, a, b in zip(("hidden", "weight"), *grads, strict=True):
        assert a is not None
        assert a.abs().max() > 1e-2, name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_merge_tokens_errors_name_the_values() -> None:
    hidden, owner, valid, weight = merge_inputs(2, 20, torch.float32)
    with pytest.raises(ShapeError, match=r"hidden must be \[B, V, D\], got \[2, 20\]"):
        merge_tokens(hidden[:, :, 0], owner, valid)
    with pytest.raises(ShapeError, match=r"owner must be int64 \[2, 20\], got torch.int32"):
        merge_tokens(hidden, owner.int(), valid)
    with pytest.raises(ShapeError, match=r"valid must be bool \[2, 20\], got torch.bool \[2, 19\]"):
        merge_tokens(hidden, owner, valid[:, :19])
    with pytest.raises(ShapeError, match=r"weight must be \[2, 20\], got \[1, 20\]"):
        merge_tokens(hidden, owner, valid, weight[:1])


# dispatch


def test_unknown_implementation_is_refused_with_a_suggestion() -> None:
    hidden, index = randn(1, 5, 3), torch.tensor([[0]])
    own, valid = torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool)
    message = (
        r"Unknown kernel implementation 'refrence'. Did you mean 'reference'\? "
        r"Available: auto, reference, torch, triton"
    )
    with pytest.raises(UnknownNameError, match=message):
        keep_tokens([hidden], index, impl="refrence")
    with pytest.raises(UnknownNameError, match=message):
        attention_rows(hidden[:, None], hidden[:, None], 1.0, real=None, impl="refrence")
    with pytest.raises(UnknownNameError, match=message):
        merge_tokens(hidden, own, valid, impl="refrence")


def test_inputs_are_not_modified() -> None:
    query, key, real = attention_inputs(2, 20, 1, torch.float32)
    hidden, owner, valid, weight = merge_inputs(2, 20, torch.float32)
    inputs = (query, key, real, hidden, owner, valid, weight)
    before = [t.clone() for t in inputs]
    attention_rows(query, key, 0.4, real=real)
    merge_tokens(hidden, owner, valid, weight)
    keep_tokens([hidden, valid], owner)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
