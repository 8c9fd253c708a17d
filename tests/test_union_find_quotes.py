"""The lines of kernels/triton_union_find.py that test_union_find_model.py models, compared with the file: a kernel that
is changed asks for a new model.
"""

from __future__ import annotations

import ast
import importlib.resources
import textwrap

import pytest

from .test_union_find_model import FIRST_RANK

# By function, its last lines: all accesses of the labels are here but those that look for contacts, which read signs.
QUOTED = {
    "_is_hot": "return tl.load(ptr + voxel, mask=there, other=0) > 0",
    "_contacts": """
        at = _is_hot(ptr, voxel, there)
        left = _is_hot(ptr, voxel - 1, there & has_left)
        contacts = tl.where(at & ((left & before) == 0), 2, 0)
        if DILATED:
            right = _is_hot(ptr, voxel + 1, there & has_right)
            contacts = contacts | tl.where(left & ((at | before) == 0), 1, 0)
            contacts = contacts | tl.where(right & ((at | after) == 0), 4, 0)
        return at, contacts << (3 * LINE)
    """,
    "_join_block": """
        ours = tl.where(hot, label - 1, 0)
        theirs = voxel + _offset(todo & -todo, width, plane)
        while tl.max(todo, 0) > 0:
            left = todo > 0
            p = tl.load(ptr + ours, mask=left, other=1, cache_modifier=".cg") - 1
            q = tl.load(ptr + theirs, mask=left, other=1, cache_modifier=".cg") - 1
            small = tl.minimum(p, q)
            large = tl.maximum(p, q)
            at_roots = left & (p == ours) & (q == theirs) & (p != q)
            old = tl.atomic_min(ptr + large, small + 1, mask=at_roots, sem="relaxed") - 1
            late = at_roots & (old != large)
            joined = (p == q) | (at_roots & (old == large))
            ours = tl.where(late, old, tl.where(at_roots, small, p))
            todo = tl.where(joined, todo & (todo - 1), todo)
            theirs = tl.where(joined, voxel + _offset(todo & -todo, width, plane), tl.where(late, small, q))
    """,
    "components_rank_kernel": """
        label = _load_block(ptr, start, lanes, num_voxels, TILE)
        hot = label > 0
        node = tl.where(hot, label - 1, 0)
        is_root = hot & (node == start + lanes)
        moves = hot & (is_root == 0)
        while tl.max(moves.to(tl.int32), 0) > 0:
            parent = tl.load(ptr + node, mask=moves, other=0, cache_modifier=".cg") - 1
            moves = moves & (parent >= 0) & (parent != node)
            node = tl.where(moves, parent, node)
        upto = tl.cumsum(is_root.to(tl.int32), 0)
        tl.store(work_ptr + HEAD + all_tiles + tile, tl.sum(is_root.to(tl.int32), 0))
        rank = upto - 1
        found = tl.where(is_root, (-rank + FIRST_RANK).to(label.dtype), node + 1)
        tl.store(ptr + start + lanes, found, mask=hot & (found != label))
    """,
    "components_number_kernel": """
        label = _load_block(ptr, start, lanes, num_voxels, TILE)
        points = label > 0
        root = tl.where(points, label - 1, start + lanes)
        seen = tl.load(ptr + root, mask=points, other=0)
        seen = tl.where(points, seen, label)
        ranked = seen <= FIRST_RANK
        roots_ptr = work_ptr + HEAD + all_tiles + row * num_tiles
        roots_before = tl.load(roots_ptr + root // TILE, mask=ranked, other=0)
        found = tl.where(ranked, roots_before + 1 - (seen - FIRST_RANK), seen)
        found = tl.where(label == INVALID, INVALID_ID, found)
        tl.store(ptr + start + lanes, found, mask=points | (label <= INVALID))
    """,
}


def source() -> ast.Module:
    """Read, not imported: that would need Triton."""
    file = importlib.resources.files("blobloss_fast") / "kernels" / "triton_union_find.py"
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", QUOTED)
def test_the_model_is_that_of_the_kernel(name):
    """Comments aside. If this fails, make the lanes of the model do what the kernel does now, and then quote it."""
    (function,) = [node for node in source().body if isinstance(node, ast.FunctionDef) and node.name == name]
    quoted = ast.unparse(ast.parse(textwrap.dedent(QUOTED[name]))).splitlines()
    last = ast.unparse(function).splitlines()[-len(quoted) :]
    assert textwrap.dedent("\n".join(last)).splitlines() == quoted


def test_nothing_else_changes_the_labels():
    """And the constants are those of the model."""
    changes = []
    for function in [node for node in source().body if isinstance(node, ast.FunctionDef)]:
        calls = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
        written = [call.split("(", 1)[1] for call in calls if call.startswith(("tl.store(", "tl.atomic"))]
        changes += [function.name for where in written if not where.startswith(("work_ptr", "roots_ptr", "counts_ptr"))]
    assert changes == ["_join_block", "components_rank_kernel", "components_number_kernel"]
    assert f"FIRST_RANK = tl.constexpr({FIRST_RANK})" in map(ast.unparse, source().body)
