"""The longest spans of texts that occur verbatim in another, long text.

The texts are made into a suffix automaton, whose states are their spans. The long text is read
through it once, byte by byte, and only a block of it need be in memory. The lengths are exact.

Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text".
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mmrec.kernels._jit import compiled_kernel

NO_BYTE = 0xFF
"""Stands between texts and between the documents of the long text. UTF-8 has no such byte."""


@compiled_kernel
def build_automaton(symbols, transitions, links, lengths, prefix_states, n_states):
    """Build the suffix automaton of a sequence.

    Args:
        symbols: (m,) int16, the sequence.
        transitions: (2 m, symbols) int32, zeros; overwritten by the state that follows each state
            with each symbol. State 0 is the empty span, and no transition leads there.
        links: (2 m,) int32, overwritten by the state of the longest suffix in another state.
        lengths: (2 m,) int32, zeros; overwritten by the longest span of each state.
        prefix_states: (m,) int32, overwritten by the state after each symbol.
        n_states: (1,) int64, overwritten by the number of states.
    """
    links[0] = -1
    count, last = 1, 0
    for i in range(len(symbols)):
        symbol, state, before = symbols[i], count, last
        count += 1
        lengths[state] = lengths[last] + 1
        while before >= 0 and transitions[before, symbol] == 0:
            transitions[before, symbol] = state
            before = links[before]
        if before < 0:
            links[state] = 0
        else:
            follower = transitions[before, symbol]
            if lengths[follower] == lengths[before] + 1:
                links[state] = follower
            else:
                clone = count
                count += 1
                lengths[clone] = lengths[before] + 1
                transitions[clone] = transitions[follower]
                links[clone] = links[follower]
                while before >= 0 and transitions[before, symbol] == follower:
                    transitions[before, symbol] = clone
                    before = links[before]
                links[follower] = clone
                links[state] = clone
        prefix_states[i] = last = state
    n_states[0] = count


@compiled_kernel
def read_through(block, symbol_of, transitions, links, lengths, position, found):
    """Read a block of the long text, and note which spans of the automaton occur in it.

    Args:
        block: (n,) uint8, the next block.
        symbol_of: (256,) int16, the symbol of each byte; -1 for those that the texts do not have.
        transitions: see ``build_automaton``.
        links: see there.
        lengths: see there.
        position: (2,) int64, state and length of the span that ends at the block; updated.
        found: (2 m,) int32, the longest span of each state that occurred; updated.
    """
    state, length = position[0], position[1]
    for i in range(len(block)):
        symbol = symbol_of[block[i]]
        if symbol < 0:
            state, length = 0, 0
            continue
        while state > 0 and transitions[state, symbol] == 0:
            state = links[state]
            length = lengths[state]
        follower = transitions[state, symbol]
        if follower > 0:
            state = follower
            length += 1
            if length > found[state]:
                found[state] = length
    position[0], position[1] = state, length


@compiled_kernel
def spread(order, links, lengths, found):
    """Extend what occurred to suffixes, and to states of which only a suffix occurred.

    Args:
        order: (states,) int64, the states by their lengths, the shortest first.
        links: see ``build_automaton``.
        lengths: see there.
        found: overwritten by the longest suffix of the spans of each state that occurred.
    """
    for i in range(len(order) - 1, 0, -1):
        state = order[i]
        if found[state] > 0:
            found[links[state]] = lengths[links[state]]
    for i in range(1, len(order)):
        state = order[i]
        if found[state] == 0:
            found[state] = found[links[state]]


def longest_copies(texts: Sequence[bytes], blocks: Iterable[bytes]) -> list[bytes]:
    """Return the longest span of each text that occurs in another text.

    Takes about eight bytes of memory for each byte of the texts and each different byte in them.

    Args:
        texts: the texts, in UTF-8.
        blocks: the other text, in UTF-8, in blocks of any length; NO_BYTE stands between documents.
    """
    joined = b"".join(text + bytes([NO_BYTE]) for text in texts)
    data = np.frombuffer(joined, np.uint8)
    alphabet, symbols = np.unique(data, return_inverse=True)
    symbol_of = np.full(256, -1, np.int16)
    symbol_of[alphabet] = np.arange(len(alphabet))
    symbol_of[NO_BYTE] = -1
    size = 2 * len(data)
    transitions = np.zeros((size, len(alphabet)), np.int32)
    links, lengths, found = (np.zeros(size, np.int32) for _ in range(3))
    states, n_states = np.zeros(len(data), np.int32), np.zeros(1, np.int64)
    build_automaton(symbols.astype(np.int16), transitions, links, lengths, states, n_states)
    position = np.zeros(2, np.int64)
    for block in blocks:
        bytes_ = np.frombuffer(block, np.uint8)
        read_through(bytes_, symbol_of, transitions, links, lengths, position, found)
    order = np.argsort(lengths[: n_states[0]], kind="stable")
    spread(order, links, lengths, found)
    copied, begin = found[states], 0  # of each place, the span that ends there
    longest = []
    for text in texts:
        here = copied[begin : begin + len(text)]
        end = int(here.argmax()) + 1 if len(text) else 0
        longest.append(text[end - int(here[end - 1]) : end] if end else b"")
        begin += len(text) + 1
    return longest
