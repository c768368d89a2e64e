"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) at the bytes of other budgets: the first tokens and the newest ones, nothing else.

No head keeps anything of a compacted group, so a region never holds more than sinks + window + group tokens, whatever the
length. What others spend on the middle of the text goes into the window, which therefore depends on the length.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tca_gguf import native
from tca_gguf.budgets import SLIDING, Budgets
from tca_gguf.errors import TcaError

from .texts import ROOM

NAME = "streaming-llm"
METRIC = "streaming"  # decides nothing, as nothing is kept, and looks at no key


def streaming_budgets(matched: Budgets, n_ctx: int, n_text: int | None = None) -> Budgets:
    """Sinks and a window in as many slots as ``matched``, which is uniform, takes in a context of ``n_ctx`` tokens.

    Tokens are dropped in groups of about ROOM, where the original drops one at a time. n_text: where a text ends and questions
    begin; no group is then compacted in the ROOM tokens behind it, as for the other policies (`texts.text_size`), and the last one
    is as shortly before it as groups allow. Raises TcaError if the slots are too few.
    """
    stored = matched.stored_layers()
    slots = native.plan_capacity(dataclasses.replace(matched, rollback=0), stored[0], 0, n_ctx)  # that hold tokens
    if slots >= n_ctx:
        return matched  # it drops nothing, so there is nothing to do better
    group = group_size(slots, n_text)
    window = slots - matched.sinks - group
    if window < 1:
        raise TcaError(f"{NAME}: {slots} tokens are too few for sinks, window and a group of {group}; use a greater length or fraction")
    heads = np.where(np.asarray(matched.head_config) == SLIDING, SLIDING, 0).astype(np.int32)
    budgets = dataclasses.replace(matched, block_size=1, group_size=group, window=window, metric=METRIC, keep_counts=(0,),
                                  configs=np.array([[group]], np.int32), head_config=heads, kept_fraction=0.0, probe=None)  # fmt: skip
    budgets.check()
    return budgets


def group_size(slots: int, n_text: int | None) -> int:
    """The smallest group, of ROOM tokens at least, that is not compacted in the ROOM tokens behind ``n_text``.

    Groups are compacted whenever all slots are taken: after slots + i * group tokens.
    """
    behind = -1 if n_text is None else n_text - slots
    if behind < 0:
        return ROOM
    # the last compaction before the questions is number i: slots + i * group <= n_text, slots + (i + 1) * group >= n_text + ROOM
    for i in range(behind // ROOM, 0, -1):
        group = -(-(behind + ROOM) // (i + 1))
        if i * group <= behind:
            return group
    return behind + ROOM
