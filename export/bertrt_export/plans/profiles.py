"""The shapes that plans are built for. The runtime relies on exactly these.

=======  =======================================================  ==================================================
part     input                                                    its shapes, least..best..most
=======  =======================================================  ==================================================
encoder  input_ids, attention_mask, token_type_ids                ``[sequences, tokens]`` of each profile of the plan,
                                                                  in its order
mlm      hidden_states                                            ``[Plan.most_tokens, hidden]``, no other
mlm      mlm_positions                                            ``[1]..[tuned]..[Plan.mlm_rows]``
mlm      mlm_candidates                                           the same rows, ``CANDIDATES`` columns
pooler   hidden_states                                            ``[Plan.most_tokens, hidden]``, no other
pooler   pooled_rows                                              ``[1]..[tuned]..[Plan.most_sequences]``
=======  =======================================================  ==================================================

``tuned`` is the most sequences that a profile is tuned for: a mask in each. The heads have one profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bertrt.architecture import BertArchitecture
from bertrt.backends.parts import CANDIDATES, ENCODER, MLM, part_inputs
from bertrt.errors import InputError
from bertrt.manifest import Heads
from bertrt.plans import Profile, Shape

# A block of so many tokens holds gigabytes of activations; a larger one is a slip.
_MOST_TOKENS: Final = 1 << 20
# Each is a copy of the encoder's kernels, and a context in the GPU's memory.
_MOST_PROFILES: Final = 16
_MOST_MLM_ROWS: Final = 1024


@dataclass(frozen=True, slots=True)
class Range:
    """The least, the best and the most that an input's shape may be."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


def default_profiles(architecture: BertArchitecture) -> tuple[Profile, ...]:
    """Profiles for single requests, tuned for 64 tokens, and blocks of up to 32 sequences, tuned for 8 of 128 tokens.

    Both take sequences as long as the model's positions allow.
    """
    longest = architecture.max_position_embeddings
    return (
        Profile((1, 1), (1, min(64, longest)), (1, longest)),
        Profile((1, 1), (8, min(128, longest)), (32, longest)),
    )


def check_profiles(profiles: Sequence[Profile], architecture: BertArchitecture) -> tuple[Profile, ...]:
    """The profiles as they were given, or the default ones if there are none.

    Raises:
        InputError: one has more tokens than the model has positions, or too many altogether; or there are too many
            profiles, or one twice.
    """
    longest = architecture.max_position_embeddings
    if len(profiles) > _MOST_PROFILES:
        raise InputError(f"{len(profiles)} profiles are too many: give at most {_MOST_PROFILES}")
    for index, profile in enumerate(profiles):
        sequences, tokens = profile.most
        if tokens > longest:
            raise InputError(
                f"the profile {profile} has sequences of {tokens} tokens, but the model has {longest} positions: "
                f"give at most {longest}"
            )
        if sequences * tokens > _MOST_TOKENS:
            raise InputError(
                f"the profile {profile} has blocks of {sequences * tokens:,} tokens; give at most {_MOST_TOKENS:,}: "
                "larger batches are run in several blocks"
            )
        if profile in profiles[:index]:
            raise InputError(f"the profile {profile} is given twice; give it once")
    return tuple(profiles) or default_profiles(architecture)


def mlm_rows(profiles: Sequence[Profile], heads: Heads) -> int:
    """`Plan.mlm_rows` of a plan with these profiles."""
    return min(_MOST_MLM_ROWS, _most_tokens(profiles)) if heads.mlm else 0


def input_ranges(
    part: str, profiles: Sequence[Profile], architecture: BertArchitecture
) -> list[dict[str, Range]]:
    """For each profile of a part's plan the shapes of its inputs; see the module."""
    if part == ENCODER:
        names = part_inputs(ENCODER)
        return [
            dict.fromkeys(names, Range(profile.least, profile.best, profile.most)) for profile in profiles
        ]
    constant = (_most_tokens(profiles), architecture.hidden_size)
    tuned = max(profile.best[0] for profile in profiles)
    most = min(_MOST_MLM_ROWS, _most_tokens(profiles)) if part == MLM else max(p.most[0] for p in profiles)
    ranges = {"hidden_states": Range(constant, constant, constant)}
    for name in part_inputs(part)[1:]:
        columns: tuple[int, ...] = (CANDIDATES,) if name == "mlm_candidates" else ()
        rows = (1, min(tuned, most), most)
        ranges[name] = Range(*((count, *columns) for count in rows))
    return [ranges]


def _most_tokens(profiles: Sequence[Profile]) -> int:
    def tokens(shape: Shape) -> int:
        return shape[0] * shape[1]

    return max(tokens(profile.most) for profile in profiles)
