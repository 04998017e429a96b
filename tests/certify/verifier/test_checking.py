"""Everything that is not exactly a true certificate is rejected, with exit status 1 and a sentence."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.certify import Certificate, certify, verifier
from stableopt.certify.files import decode_weights, encode_weights
from stableopt.certify.standalone import write_verifier
from stableopt.certify.verifier import checking
from stableopt.certify.verifier.claims import margin_constants
from stableopt.certify.verifier.numbers import gamma
from stableopt.nn import GradientBlock, GroupSort
from tests.certify.models import rich_model
from tests.certify.oracle import lowered, recheck, statement

Document = dict[str, Any]


@pytest.fixture(scope="module")
def cert() -> Certificate:
    model, shape = rich_model()
    return certify(model, shape)


def graph(document: Document) -> list[Document]:
    return document["predicate"]["graph"]


def proved(document: Document) -> list[Document]:
    return document["predicate"]["claims"]["proved"]


def claim(document: Document, kind: str) -> Document:
    return next(entry for entry in proved(document) if entry["id"] == kind)


JOINT: Document = {"nodes": [], "multipliers": [["0x1.0p+0"]], "bound": "0x1.0p+9"}


def test_an_honest_certificate_is_verified(cert: Certificate) -> None:
    result = recheck(cert, lambda d: None)
    assert result.verified, result.reason
    assert result.lipschitz == cert.lipschitz
    assert len(result.layers) == len(cert.layers)
    assert [a[:2] for a in result.assumptions] == ["H1", "H2", "H3", "H4", "H5"]


def _claims(cert: Certificate) -> list[tuple[str, Callable[[Document], None]]]:
    """Every claimed number of the file, lowered by 1e-8."""
    edits: list[tuple[str, Callable[[Document], None]]] = []
    for index, node in enumerate(statement(cert)["predicate"]["graph"]):
        edits += [
            (f"{index}.{key}", lambda d, i=index, k=key: graph(d)[i].update({k: lowered(graph(d)[i][k])}))
            for key in ("bound",)
            if key in node
        ]
    edits.append(("operator", lambda d: (op := graph(d)[BLOCK]["operator"]).update(bound=lowered(op["bound"]))))
    edits.append(("L", lambda d: proved(d)[0].update(L=lowered(proved(d)[0]["L"]))))
    for i, j in ((0, 1), (1, 2), (0, 2)):

        def lower(d: Document, i: int = i, j: int = j) -> None:
            table = proved(d)[1]["L"]
            table[i][j] = table[j][i] = lowered(table[i][j])

        edits.append((f"L_{i}{j}", lower))
    return edits


def test_every_number_lowered_by_1e_8_is_rejected(cert: Certificate) -> None:
    edits = _claims(cert)
    assert len(edits) == 11 + 1 + 1 + 3
    for name, edit in edits:
        result = recheck(cert, edit)
        assert not result.verified, name
        assert result.reason, name


def test_a_higher_claim_is_still_true(cert: Certificate) -> None:
    def higher(d: Document) -> None:
        proved(d)[0]["L"] = (cert.lipschitz * 2).hex()

    assert recheck(cert, higher).lipschitz == 2 * cert.lipschitz


def test_every_changed_byte_of_the_weights_is_rejected(cert: Certificate) -> None:
    for position in range(len(cert.weights)):
        data = bytearray(cert.weights)
        data[position] ^= 1 << (position % 8)
        result = verifier.check(cert.certificate, lambda _, data=data: bytes(data))
        assert not result.verified
        assert "digest" in result.reason


def test_larger_weights_are_rejected_even_with_the_right_digest(cert: Certificate) -> None:
    """The digest is no proof: the numbers are what is checked."""
    for name, value in decode_weights(cert.weights).items():
        if name.endswith("weight"):
            tensors = decode_weights(cert.weights) | {name: value * 1.0001}
            assert not recheck(cert, lambda d: None, encode_weights(tensors)).verified, name


def _remove_claim(d: Document) -> None:
    proved(d).pop(0)


BLOCK, TANH = 8, 9

REASONS = {
    "dropped layer": "operation 0 (groupsort): it reads a value that is not there yet",
    "dropped last layer": "tensors outside the program: ['9.bias', '9.weight']",
    "operation of another name": "operation 1 (swish): it has no rule in l2",
    "unknown op": "operation 11 (hopfield): it has no rule in l2",
    "unknown activation": "operation 9 (activation): the activation 'snake' has no rule here",
    "unknown key of a node": "operation 0 (conv): it has wrong keys",
    "unknown key of an activation": "operation 9 (activation): the activation 'tanh' has wrong settings",
    "missing key of a node": "operation 0 (conv): it has wrong keys",
    "missing bound": "operation 9 (activation): the bound must be a finite hexadecimal float",
    "node is a list": "operation 0 (None): an operation has no name",
    "op is a list": "operation 0 (['conv']): an operation has no name",
    "unknown proved id": "a claim 'accuracy' cannot be proved",
    "double proved id": "there must be one claim of a Lipschitz constant",
    "no lipschitz claim": "there must be one claim of a Lipschitz constant",
    "claim with extra key": "the claim 'lipschitz' has wrong keys",
    "claims missing": "the claims are malformed",
    "replayable missing": "the claims are malformed",
    "schema 1": "the schema is unknown; version 2 is known",
    "schema true": "there is no predicate",
    "schema 2.0": "there is no predicate",
    "other predicate": "the certificate is of an unknown type",
    "other type": "the certificate is not an in-toto statement",
    "no predicate": "there is no predicate",
    "metric linf": "operation 0 (conv): the bound 0.9",
    "bounded domain": "the input is malformed",
    "other input shape": "operation 0 (conv): a convolution of 2 channels follows the shape (3, ",
    "empty input shape": "the input shape is empty or too large",
    "input shape of booleans": "input shape: expected a list of integers >= 1",
    "empty graph": "the program is malformed",
    "graph is an object": "the program is malformed",
    "other digest": "the digest of 'model.safetensors' does not match",
    "no digest": "there is no SHA-256 digest",
    "two subjects": "there must be one subject",
    "no subject": "there must be one subject",
    "path traversal": "unsafe weight file name",
    "absolute path": "unsafe weight file name",
    "backslash path": "unsafe weight file name",
    "hidden file": "unsafe weight file name",
    "name with newline": "unsafe weight file name",
    "decimal number": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "decimal string": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "negative bound": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "infinite bound": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "nan bound": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "overflowing bound": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "upper-case hex": "operation 0 (conv): the bound must be a finite hexadecimal float >= 0",
    "missing tensor": "operation 0 (conv): the tensor 'absent' is not in the weight file",
    "tensor name is null": "operation 0 (conv): the tensor None is not in the weight file",
    "bias dropped (hidden tensor)": "tensors outside the program: ['0.bias']",
    "bias of another layer": "operation 0 (conv): the tensor '6.1.bias' must have 4 entries",
    "wrong groups": "operation 0 (conv): a convolution of 4 channels follows the shape (2, ",
    "groups 0": "operation 0 (conv): groups must divide the channels",
    "wrong dims": "operation 0 (conv): the tensor '0.weight' must have 3 dimensions",
    "stride 0": "operation 0 (conv): stride: expected a list of 2 integers >= 1",
    "negative padding": "operation 0 (conv): padding: expected a list of 2 integers >= 0",
    "reflect padding": "operation 0 (conv): padding_mode must be one of ('zeros', 'circular')",
    "too much circular padding": "operation 3 (conv): too much circular padding",
    "window larger than image": "operation 0 (conv): a convolution has no output, or an output_padding",
    "pool padded too much": "operation 2 (pool): a pool does not fit its image",
    "unknown pool": "operation 2 (pool): the pool must be one of ('avg', 'max')",
    "pool with dims true": "operation 2 (pool): dims must be one of (1, 2, 3)",
    "group size 3": "operation 1 (groupsort): group_size must divide the channels",
    "group size 0": "operation 1 (groupsort): group_size: expected a list of integers >= 1",
    "steep slope": "operation 4 (activation): the bound is not proved",
    "steep negative slope": "operation 4 (activation): the bound is not proved",
    "block with gelu": "operation 8 (euler): a block needs an activation with slopes in [0, 1]",
    "block with gelu and a slope": "operation 8 (euler): the activation 'gelu' has wrong settings",
    "block with leaky_relu without slope": "operation 8 (euler): the activation 'leaky_relu' has wrong settings",
    "block with steep slope": "operation 8 (euler): a block needs an activation with slopes in [0, 1]",
    "block with negative slope": "operation 8 (euler): a block needs an activation with slopes in [0, 1]",
    "block with negative step": "operation 8 (euler): step must be a finite hexadecimal float >= 0",
    "block with a larger step": "operation 8 (euler): the bound of the block is not proved",
    "block without damping": "operation 8 (euler): the bound of the block is not proved",
    "block taken a thousand million times": "operation 8 (euler): 'times' must be an integer from 1 to 10000",
    "block with a strange key": "operation 8 (euler): it has wrong keys",
    "block whose operator has a strange key": "operation 8 (euler): an operator has wrong keys",
    "block with a bound of its skew part": "there is a bound of a skew part",
    "value used before it is there": "operation 1 (groupsort): it reads a value that is not there yet",
    "a value is skipped": "a value is not used",
    "two inputs": "operation 1 (groupsort): it reads one value",
    "no input": "operation 1 (groupsort): it reads a value that is not there yet",
    "input of true": "operation 1 (groupsort): in: expected a list of integers >= 0",
    "a joint bound of nothing": "a joint bound has wrong keys",
    "a joint bound of a convolution": "a joint bound alternates dense layers and activations",
    "a lipschitz claim among the attested": "the attested claims are malformed",
    "a fourth tier": "the claims are malformed",
    "the claim in another norm": "the Lipschitz constant is claimed in another norm",
    "an exponent too low": "the forward exponent is not proved",
    "an exponent over too many steps": "the depth is above the number of operations",
    "a contraction of nothing": "a contraction names values that are not there",
    "stability of a convolution": "stability is claimed of no recurrent operation",
    "a logarithmic norm of a convolution": "a logarithmic norm needs a linear operation, in l2",
    "asymmetric margins": "the margin constants are not symmetric",
    "margins with a diagonal": "the margin constants are not symmetric",
    "margins of another size": "the margin constants have the wrong shape",
    "ragged margins": "the margin constants have the wrong shape",
    "margins before a nonlinearity": "margin constants need a dense last layer",
    "empty": "the weight file is too short to be safetensors",
    "trailing byte": "the weight file has trailing bytes",
    "truncated": "tensor '9.weight' lies outside the file",
    "half": "tensor '0.weight' lies outside the file",
    "huge header": "the weight file has an impossible header length",
    "header beyond the file": "the weight file has an impossible header length",
    "pickle": "the weight file has an impossible header length",
    "zip": "the weight file has an impossible header length",
    "text": "the weight file has an impossible header length",
    "header is a list": "the weight file has no safetensors header",
    "header is not utf-8": "not valid JSON (UnicodeDecodeError)",
    "deep header": "not valid JSON (RecursionError)",
    "nan literal": "the JSON constant NaN is not allowed",
    "duplicate tensor": "a JSON object has a duplicate key",
    "integer dtype": "tensor '0.bias' has the unknown dtype 'I32'",
    "unknown dtype": "tensor '0.bias' has the unknown dtype 'F8'",
    "dtype is a list": "tensor '0.bias' has the unknown dtype ['F32']",
    "wider dtype": "tensor '0.bias' has the wrong number of bytes",
    "other shape": "tensor '0.bias' has the wrong number of bytes",
    "negative shape": "0.bias: expected a list of integers >= 1",
    "empty shape": "0.bias: expected a list of integers >= 1",
    "float shape": "0.bias: expected a list of integers >= 1",
    "offsets beyond the file": "tensor '0.bias' lies outside the file",
    "reversed offsets": "tensor '0.bias' lies outside the file",
    "overlap": "the tensors of the weight file overlap or leave gaps",
    "three offsets": "tensor '0.bias' lies outside the file",
    "extra key": "bad header of tensor '0.bias'",
    "metadata of numbers": "bad weight file metadata",
    "hidden tensor": "tensors outside the program: ['hidden']",
    "nan": "the weights are not finite",
}
"""What the reason of each rejection must say, so that no input is rejected for something else."""


EDITS: dict[str, Callable[[Document], Any]] = {
    "dropped layer": lambda d: graph(d).pop(0),
    "dropped last layer": lambda d: graph(d).pop(),
    "operation of another name": lambda d: graph(d)[1].update(op="swish"),
    "unknown op": lambda d: graph(d).append({"op": "hopfield", "in": [11], "bound": "0x1.0p+0"}),
    "unknown activation": lambda d: graph(d)[TANH].update(name="snake"),
    "unknown key of a node": lambda d: graph(d)[0].update(extra=1),
    "unknown key of an activation": lambda d: graph(d)[TANH].update(extra=1),
    "missing key of a node": lambda d: graph(d)[0].pop("groups"),
    "missing bound": lambda d: graph(d)[TANH].pop("bound"),
    "node is a list": lambda d: graph(d).__setitem__(0, []),
    "op is a list": lambda d: graph(d)[0].update(op=["conv"]),
    "unknown proved id": lambda d: proved(d).append({"id": "accuracy", "L": "0x1.0p+0"}),
    "double proved id": lambda d: proved(d).append(dict(proved(d)[0])),
    "no lipschitz claim": _remove_claim,
    "claim with extra key": lambda d: proved(d)[0].update(note="x"),
    "claims missing": lambda d: d["predicate"].pop("claims"),
    "replayable missing": lambda d: d["predicate"]["claims"].pop("replayable"),
    "schema 1": lambda d: d["predicate"].update(schema=1),
    "schema true": lambda d: d["predicate"].update(schema=True),
    "schema 2.0": lambda d: d["predicate"].update(schema=2.0),
    "other predicate": lambda d: d.update(predicateType="https://example.org/x"),
    "other type": lambda d: d.update(_type="x"),
    "no predicate": lambda d: d.pop("predicate"),
    "metric linf": lambda d: d["predicate"]["input"].update(metric="linf"),
    "bounded domain": lambda d: d["predicate"]["input"].update(domain="[0,1]^n"),
    "other input shape": lambda d: d["predicate"]["input"].update(shape=[3, 6, 6]),
    "empty input shape": lambda d: d["predicate"]["input"].update(shape=[]),
    "input shape of booleans": lambda d: d["predicate"]["input"].update(shape=[True, True]),
    "empty graph": lambda d: d["predicate"].update(graph=[]),
    "graph is an object": lambda d: d["predicate"].update(graph={}),
    "other digest": lambda d: d["subject"][0]["digest"].update(sha256="0" * 64),
    "no digest": lambda d: d["subject"][0].pop("digest"),
    "two subjects": lambda d: d["subject"].append(d["subject"][0]),
    "no subject": lambda d: d.pop("subject"),
    "path traversal": lambda d: d["subject"][0].update(name="../model.safetensors"),
    "absolute path": lambda d: d["subject"][0].update(name="/model.safetensors"),
    "backslash path": lambda d: d["subject"][0].update(name="..\\model.safetensors"),
    "hidden file": lambda d: d["subject"][0].update(name=".model"),
    "name with newline": lambda d: d["subject"][0].update(name="model.safetensors\n"),
    "decimal number": lambda d: graph(d)[0].update(bound=3.0),
    "decimal string": lambda d: graph(d)[0].update(bound="3.0"),
    "negative bound": lambda d: graph(d)[0].update(bound="-0x1.0p+3"),
    "infinite bound": lambda d: graph(d)[0].update(bound="inf"),
    "nan bound": lambda d: graph(d)[0].update(bound="nan"),
    "overflowing bound": lambda d: graph(d)[0].update(bound="0x1.0p+1024"),
    "upper-case hex": lambda d: graph(d)[0].update(bound="0X1.0P+9"),
    "missing tensor": lambda d: graph(d)[0].update(weight="absent"),
    "tensor name is null": lambda d: graph(d)[0].update(weight=None),
    "bias dropped (hidden tensor)": lambda d: graph(d)[0].update(bias=None),
    "bias of another layer": lambda d: graph(d)[0].update(bias="6.1.bias"),
    "wrong groups": lambda d: graph(d)[0].update(groups=2),
    "groups 0": lambda d: graph(d)[0].update(groups=0),
    "wrong dims": lambda d: graph(d)[0].update(dims=1),
    "stride 0": lambda d: graph(d)[0].update(stride=[0, 1]),
    "negative padding": lambda d: graph(d)[0].update(padding=[-1, 0]),
    "reflect padding": lambda d: graph(d)[0].update(padding_mode="reflect"),
    "too much circular padding": lambda d: graph(d)[3].update(padding=[2, 1]),
    "window larger than image": lambda d: graph(d)[0].update(dilation=[9, 9]),
    "pool padded too much": lambda d: graph(d)[2].update(padding=[2, 2]),
    "unknown pool": lambda d: graph(d)[2].update(name="sum"),
    "pool with dims true": lambda d: graph(d)[2].update(dims=True, kernel=[2], stride=[1], padding=[0]),
    "group size 3": lambda d: graph(d)[1].update(group_size=3),
    "group size 0": lambda d: graph(d)[1].update(group_size=0),
    "steep slope": lambda d: graph(d)[4].update(slope=(1.5).hex()),
    "steep negative slope": lambda d: graph(d)[4].update(slope=(-1.5).hex()),
    "block with gelu": lambda d: graph(d)[BLOCK]["activation"].update(name="gelu") or graph(d)[BLOCK]["activation"].pop("slope"),
    "block with gelu and a slope": lambda d: graph(d)[BLOCK]["activation"].update(name="gelu"),
    "block with leaky_relu without slope": lambda d: graph(d)[BLOCK]["activation"].pop("slope"),
    "block with steep slope": lambda d: graph(d)[BLOCK]["activation"].update(slope=(1.5).hex()),
    "block with negative slope": lambda d: graph(d)[BLOCK]["activation"].update(slope=(-0.5).hex()),
    "block with negative step": lambda d: graph(d)[BLOCK].update(step=(-0.5).hex()),
    "block with a larger step": lambda d: graph(d)[BLOCK].update(step=(float.fromhex(graph(d)[BLOCK]["step"]) * 4).hex()),
    "block without damping": lambda d: graph(d)[BLOCK].update(decay=(1.0).hex()),
    "block taken a thousand million times": lambda d: graph(d)[BLOCK].update(times=10**9),
    "block with a strange key": lambda d: graph(d)[BLOCK].update(note=1),
    "block whose operator has a strange key": lambda d: graph(d)[BLOCK]["operator"].update(note=1),
    "block with a bound of its skew part": lambda d: graph(d)[BLOCK].update(skew_bound=(0.0).hex()),
    "value used before it is there": lambda d: graph(d)[1].update({"in": [5]}),
    "a value is skipped": lambda d: graph(d)[2].update({"in": [1]}),
    "two inputs": lambda d: graph(d)[1].update({"in": [1, 1]}),
    "no input": lambda d: graph(d)[1].update({"in": []}),
    "input of true": lambda d: graph(d)[1].update({"in": [True]}),
    "a joint bound of nothing": lambda d: d["predicate"].update(joint=[{}]),
    "a joint bound of a convolution": lambda d: d["predicate"].update(joint=[JOINT | {"nodes": [0, 1, 2]}]),
    "a lipschitz claim among the attested": lambda d: d["predicate"]["claims"]["attested"].append(dict(proved(d)[0])),
    "a fourth tier": lambda d: d["predicate"]["claims"].update(believed=[]),
    "the claim in another norm": lambda d: proved(d)[0].update(norm="linf"),
    "an exponent too low": lambda d: claim(d, "forward_exponent").update(rate=lowered(claim(d, "forward_exponent")["rate"])),
    "an exponent over too many steps": lambda d: claim(d, "forward_exponent").update(depth=12),
    "a contraction of nothing": lambda d: proved(d).append({"id": "contraction", "from": 3, "to": 3, "factor": "0x1.0p+0"}),
    "stability of a convolution": lambda d: proved(d).append(
        {"id": "stability", "node": 0, "rate": "0x0.0p+0", "gain": "0x1.0p+9"}
    ),
    "a logarithmic norm of a convolution": lambda d: proved(d).append({"id": "lognorm", "node": 0, "mu": "0x1.0p+9"}),
    "asymmetric margins": lambda d: proved(d)[1]["L"][0].__setitem__(1, (99.0).hex()),
    "margins with a diagonal": lambda d: proved(d)[1]["L"][0].__setitem__(0, (1.0).hex()),
    "margins of another size": lambda d: proved(d)[1]["L"].pop(),
    "ragged margins": lambda d: proved(d)[1]["L"][0].pop(),
    "margins before a nonlinearity": lambda d: graph(d).append(
        {"op": "activation", "in": [11], "name": "relu", "bound": "0x1.0p+0"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_tampered_certificate_is_rejected(cert: Certificate, name: str) -> None:
    assert recheck(cert, lambda d: None).verified
    result = recheck(cert, EDITS[name])
    assert not result.verified
    assert REASONS[name] in result.reason
    assert result.lipschitz is None


def _header(data: bytes) -> tuple[Document, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _file(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _entry(data: bytes, **changes: Any) -> bytes:
    header, body = _header(data)
    header["0.bias"].update(changes)
    return _file(header, body)


def _hidden(data: bytes) -> bytes:
    return encode_weights(decode_weights(data) | {"hidden": torch.zeros(1)})


def _nan(data: bytes) -> bytes:
    tensors = decode_weights(data)
    tensors["0.bias"][0] = math.nan
    return encode_weights(tensors)


def _double(data: bytes) -> bytes:
    header, body = _header(data)
    text = json.dumps(header)
    return _file((text[:-1] + ', "0.bias": ' + json.dumps(header["0.bias"]) + "}").encode(), body)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "trailing byte": lambda data: data + b"\0",
    "truncated": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "huge header": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header beyond the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "pickle": lambda data: pickle.dumps({"weight": [1.0]}),
    "zip": lambda data: b"PK\x03\x04" + data,
    "text": lambda data: b"not a weight file at all",
    "header is a list": lambda data: _file([], b""),
    "header is not utf-8": lambda data: _file(b'{"\xff": 1}', b""),
    "deep header": lambda data: _file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "nan literal": lambda data: _file(b'{"a": NaN}', b""),
    "duplicate tensor": _double,
    "integer dtype": lambda data: _entry(data, dtype="I32"),
    "unknown dtype": lambda data: _entry(data, dtype="F8"),
    "dtype is a list": lambda data: _entry(data, dtype=["F32"]),
    "wider dtype": lambda data: _entry(data, dtype="F64"),
    "other shape": lambda data: _entry(data, shape=[5]),
    "negative shape": lambda data: _entry(data, shape=[-4]),
    "empty shape": lambda data: _entry(data, shape=[0]),
    "float shape": lambda data: _entry(data, shape=[4.0]),
    "offsets beyond the file": lambda data: _entry(data, data_offsets=[0, 10**9]),
    "reversed offsets": lambda data: _entry(data, data_offsets=[16, 0]),
    "overlap": lambda data: _entry(data, data_offsets=[16, 32]),
    "three offsets": lambda data: _entry(data, data_offsets=[0, 16, 16]),
    "extra key": lambda data: _entry(data, note=1),
    "metadata of numbers": lambda data: _file(_header(data)[0] | {"__metadata__": {"a": 1}}, _header(data)[1]),
    "hidden tensor": _hidden,
    "nan": _nan,
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_weight_file_is_rejected_even_with_its_digest(cert: Certificate, name: str) -> None:
    result = recheck(cert, lambda d: None, FILES[name](cert.weights))
    assert not result.verified
    assert REASONS[name] in result.reason


def test_metadata_of_strings_is_harmless(cert: Certificate) -> None:
    header, body = _header(cert.weights)
    assert recheck(cert, lambda d: None, _file(header | {"__metadata__": {"format": "pt"}}, body)).verified


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 10**6,
        b"9" * 10**5,
    ],
)
def test_a_malformed_certificate_is_rejected(text: bytes) -> None:
    result = verifier.check(text, lambda _: b"")
    assert not result.verified
    assert result.reason


def test_duplicate_keys_in_a_certificate_are_rejected(cert: Certificate) -> None:
    text = cert.certificate.replace(b'"schema": 2', b'"schema": 2, "schema": 2')
    result = verifier.check(text, lambda _: cert.weights)
    assert "duplicate" in result.reason


def test_too_large_a_certificate_is_rejected_unread(monkeypatch: pytest.MonkeyPatch, cert: Certificate) -> None:
    monkeypatch.setattr(checking, "_MAX_CERTIFICATE", len(cert.certificate) - 1)
    assert "large" in recheck(cert, lambda d: d.update(pad=" " * 9999)).reason
    monkeypatch.setattr(checking, "_MAX_CERTIFICATE", len(cert.certificate))
    assert verifier.check(cert.certificate, lambda _: cert.weights).verified


def test_margin_constants_are_above_the_truth_and_close() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-300, 1e-150, 1.0, 1e150):
        weight = rng.standard_normal((5, 3)) * scale
        weight[3] = weight[2]
        table = margin_constants(weight, Fraction(3, 2))
        for i in range(5):
            for j in range(5):
                square = sum(
                    (Fraction(a) - Fraction(b)) ** 2
                    for a, b in zip(weight[i].tolist(), weight[j].tolist(), strict=True)
                )
                claimed = Fraction(float(table[i, j])) ** 2
                assert claimed >= square * Fraction(9, 4)
                assert claimed <= square * Fraction(9, 4) * (1 + Fraction(1, 10**13))


def test_the_rounding_of_margin_constants_is_counted() -> None:
    weight = np.array([[1.0 / 64] * 4096, [-1.0 / 64] * 4096])  # the difference has norm 2, and nothing rounds
    assert margin_constants(weight, Fraction(1))[0, 1] >= 2 * (1 + 0.9 * float(gamma(4096)) / 2)


def test_rows_that_are_nearly_equal_are_not_called_equal() -> None:
    weight = np.array([[1.0, 1e-200], [1.0, 0.0]])
    assert margin_constants(weight, Fraction(1))[0, 1] >= 1e-200


@pytest.mark.parametrize(
    ("step", "strong", "needed"), [(1.0, 0.0, 3.0), (1.0, 0.5, 3.5), (0.25, 0.0, 1.0), (0.25, 1.0, 0.75)]
)
def test_both_ends_of_the_spectrum_of_a_block_are_claimed(step: float, strong: float, needed: float) -> None:
    """With A = 2I the Jacobian has eigenvalues between 1 - step (strong + 4) and 1 - step strong, also beyond the step limit."""
    block = GradientBlock(2)
    with torch.no_grad():
        block.weight.copy_(2 * torch.eye(2))
    cert = certify(block, (2,))

    def claiming(bound: float) -> verifier.Result:
        def edit(d: Document) -> None:
            graph(d)[0].update(step=step.hex(), decay=(1.0 - step * strong).hex(), bound=bound.hex())
            d["predicate"]["claims"]["proved"] = [{"id": "lipschitz", "norm": "l2", "L": bound.hex()}]

        return recheck(cert, edit)

    assert claiming(needed * (1 + 1e-7)).verified
    assert not claiming(needed * (1 - 1e-7)).verified


SLOPES = {
    "relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "gelu": nn.GELU(), "silu": nn.SiLU(),
    "softplus": nn.Softplus(3.0), "elu": nn.ELU(1.5), "leaky_relu": nn.LeakyReLU(-2.0), "hardtanh": nn.Hardtanh(-1.0, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPES)
def test_the_constant_of_an_activation_is_its_largest_slope(name: str) -> None:
    x = torch.linspace(-30, 30, 2_000_001, requires_grad=True)
    SLOPES[name](x).sum().backward()
    steepest = float(x.grad.abs().max())
    claimed = certify(SLOPES[name], (1,)).lipschitz
    assert steepest <= claimed <= steepest * 1.0002


def test_sorting_is_an_isometry_at_least_somewhere_and_never_expands() -> None:
    a, b = torch.randn(500, 6), torch.randn(500, 6)
    ratio = (GroupSort(3)(a) - GroupSort(3)(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert float(ratio.max()) <= certify(GroupSort(3), (6,)).lipschitz + 1e-12
    assert certify(GroupSort(3), (6,)).lipschitz == 1.0


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1), (2, 1, 0), (2, 3, 1), (5, 2, 2)]
)
def test_the_bounds_of_pools(kernel: int, stride: int, padding: int) -> None:
    from tests.certify.oracle import operator_matrix

    average = nn.AvgPool1d(kernel, stride, padding)
    true = np.linalg.norm(operator_matrix(average, (1, 24)), 2)
    claimed = certify(average, (1, 24)).lipschitz
    assert true <= claimed * (1 + 1e-12)
    assert claimed == pytest.approx(math.sqrt(math.ceil(kernel / stride) / kernel))
    largest = nn.MaxPool1d(kernel, stride, padding)
    peak = torch.zeros(1, 1, 24)
    peak[0, 0, 12] = 1.0
    shifted = max(float(largest(peak.roll(i, 2)).norm()) for i in range(6))  # one pixel appears in ceil(k/s) windows
    assert shifted == pytest.approx(certify(largest, (1, 24)).lipschitz)


# -------------------------------------------------------------------------------------------------- as a copied file


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_the_copied_file_needs_neither_torch_nor_this_package(cert: Certificate, tmp_path: Path) -> None:
    cert.save(tmp_path)
    write_verifier(tmp_path / "verify.pyz")
    (tmp_path / "block.py").write_text(
        "import sys, runpy\n"
        "for name in ('torch', 'stableopt', 'scipy', 'safetensors'): sys.modules[name] = None\n"
        "sys.argv = ['verify.pyz', *sys.argv[1:]]\n"
        "runpy.run_path('verify.pyz', run_name='__main__')\n"
    )
    good = run("block.py", "model.cert.json", "--json", folder=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    report = json.loads(good.stdout)
    assert report["verified"] is True
    assert report["lipschitz"] == cert.lipschitz

    plain = run("verify.pyz", "model.cert.json", folder=tmp_path)
    assert plain.returncode == 0
    assert "H1" in plain.stdout
    assert plain.stdout.strip().splitlines()[-1].startswith("verified")

    (tmp_path / "model.safetensors").write_bytes(cert.weights[:-1])
    bad = run("verify.pyz", "model.cert.json", folder=tmp_path)
    assert (bad.returncode, bad.stderr) == (1, "")
    assert bad.stdout.startswith("rejected: ")


def test_exit_statuses(cert: Certificate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = cert.save(tmp_path)
    assert verifier.main([str(path)]) == 0
    assert verifier.main([str(path), "--json"]) == 0
    assert verifier.main([]) == 2
    assert verifier.main(["a", "b"]) == 2
    assert verifier.main(["--help"]) == 2
    assert verifier.main([str(tmp_path / "absent.json")]) == 2
    assert verifier.main([str(tmp_path)]) == 0
    assert verifier.main([str(tmp_path / "absent")]) == 2
    (tmp_path / "model.safetensors").unlink()
    assert verifier.main([str(path)]) == 1
    assert "cannot be read" in capsys.readouterr().out
    (tmp_path / "model.safetensors").mkdir()
    assert verifier.main([str(path), "--json"]) == 1
    path.write_bytes(cert.weights)
    assert verifier.main([str(path)]) == 1


def test_a_weight_file_outside_the_folder_is_never_read(cert: Certificate, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    _, path = cert.save(inner)
    shutil.move(inner / "model.safetensors", tmp_path / "model.safetensors")
    document = json.loads(path.read_bytes())
    document["subject"][0]["name"] = "../model.safetensors"
    path.write_text(json.dumps(document))
    result = verifier.verify(path)
    assert "unsafe" in result.reason


def test_a_machine_with_wrong_arithmetic_verifies_nothing(
    cert: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = cert.save(tmp_path)
    checking.self_test(np.matmul)
    strange: list[Callable[[np.ndarray, np.ndarray], np.ndarray]] = [
        lambda a, b: (a.astype(np.float32) @ b.astype(np.float32)).astype(float),  # a lower precision inside
        lambda a, b: (a @ b) * (1 + 2.0**-52),
    ]
    for product in strange:
        with pytest.raises(OSError, match="cannot verify"):
            checking.self_test(product)
    monkeypatch.setattr(checking.np, "matmul", strange[0])
    assert verifier.main([str(path)]) == 2


@pytest.mark.slow
def test_random_damage_is_rejected_without_a_traceback(cert: Certificate) -> None:
    rng = np.random.default_rng(0)
    text = cert.certificate
    accepted = 0
    for _ in range(3000):
        data = bytearray(text)
        for _ in range(int(rng.integers(1, 4))):
            data[rng.integers(len(data))] = rng.integers(32, 127)
        result = verifier.check(bytes(data), lambda _: cert.weights)
        accepted += result.verified
        assert result.verified or result.reason
    assert accepted < 3000  # what is accepted touched free text only, or raised a claim
