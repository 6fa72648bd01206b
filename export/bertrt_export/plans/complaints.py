"""What the library has to complain about, in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from bertrt.backends.tensorrt.library import Messages

_MOST: Final = 3
_LONGEST: Final = 400
# Follows from other errors, or says that there is no GPU, which the builder of TensorRT for RTX does not need.
_NOISE: Final = re.compile(r"catchCudaError|ScopedCudaStream|^Invalid Node - |^---|^Node name: |^\[\d+\] ")
# Where in the library's own sources a message arose.
_SOURCES: Final = (
    re.compile(r"\s*In \w+ at /\S+?:\d+"),
    re.compile(r"^\w+::\w+: Error Code \d+: "),
    re.compile(r"\[\w+\.\w+:\d+: \w+\] "),
    re.compile(r"In node -1 with name:\s+and operator:\s+\(\w+\): \w+: "),
    re.compile(r"Assertion failed: (?:\S+: )?"),
    re.compile(r"^ModelImporter\.cpp:\d+: (?:ERROR: )?|^\w+\.cpp:\d+: "),
)


def describe_parser_errors(parser: Any, messages: Messages) -> str:
    """The parser's errors, each with the node's name and operator."""
    found = []
    for index in range(min(parser.num_errors, _MOST)):
        error = parser.get_error(index)
        node = error.node_name()
        where = f"node {node!r} ({error.node_operator()}): " if node else ""
        found.append(where + _condense(error.desc().splitlines()))
    if found and not any("node " in text for text in found):
        # About files and tensors the log says more.
        found.append(_condense(messages.errors[:1]))
    return "; ".join(dict.fromkeys(text for text in found if text)) or describe_messages(messages)


def describe_messages(messages: Messages) -> str:
    """The first errors that the library has logged."""
    lines = [text for message in messages.errors for text in (_condense(message.splitlines()),) if text]
    return "; ".join(list(dict.fromkeys(lines))[:_MOST]) or (
        "it gives no reason (another logger may have been given to it first in this process)"
    )


def attention_has_no_kernel(messages: Messages) -> bool:
    """Whether the library says that it has no fused kernel for an attention layer."""
    return any("not supported by a dedicated kernel" in message for message in messages.errors)


def _condense(lines: Sequence[str] | Iterable[str]) -> str:
    text = " ".join(line.strip() for line in lines if line.strip() and not _NOISE.search(line.strip()))
    for source in _SOURCES:
        text = source.sub("", text)
    return text.strip()[:_LONGEST]
