"""Reads of a kernel's Triton GPU dialect whether its pipelined loops are right, which Triton does not see to."""

import re
from collections import Counter


def refilled_early(ttgir: str) -> set[str]:
    """Buffers of a pipelined loop that have too few slots. A product of Hopper goes on while the loop loads ahead, so
    they need one slot more than are loaded ahead. Triton 3.6 to 3.9 forgets it where the program also reads the tile
    into registers. On a GPU such a product is wrong now and then."""
    slots = {name: int(n) for name, n in re.findall(r"%(\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)}
    views = dict(re.findall(r"%(\S+) = ttg\.memdesc_\w+ %(\w+)", ttgir))

    def buffer(name: str) -> str:
        return buffer(views[name]) if name in views else name

    loads = Counter(buffer(name) for name in re.findall(r"async_copy_global_to_local %\w+, %(\w+)", ttgir))
    under_way = re.findall(r"warp_group_dot_wait ([^{\n]*) \{pendings = [1-9]", ttgir)
    read = {buffer(name) for operands in under_way for name in re.findall(r"%(\w+)", operands)}
    return {name for name in read & slots.keys() if slots[name] < loads[name]}  # all loads but one are from before it
