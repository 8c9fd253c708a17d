"""The union-find of Triton's connected components: join, rank, scan and number, of the five kernels that
triton_components.py describes. They read and write labels alone, whatever the mask was.

Races. Kernels of one stream run one after the other, so only the programs of one kernel race, and only here:
    join    changes slots by atomic_min alone. A parent only ever becomes smaller and stays in the same component, so
            whoever reads an old one walks a longer way, but arrives. The smaller root is linked only if the returned
            value says that the larger one still was a root; otherwise the parent that it has got in the meantime
            remains to be joined. Each step goes to a smaller voxel, so it ends. Which order wins decides the shape of
            the trees, never who is in one. tests/test_union_find_model.py runs these steps in all orders.
    rank    writes each slot once, by the lane of the voxel. Who walks through it sees the parent or the root, or in a
            root, itself or a rank: from each it arrives at the same root.
    number  likewise: of a root one sees the rank or the id already made of it, which mean the same id.
The signs of what is read tell these apart, and no sign of a background voxel ever changes.
"""

import triton
import triton.language as tl

IGNORED = tl.constexpr(-1)
INVALID = tl.constexpr(-2)  # until the last kernel, which makes it an id beyond any capacity: the loss is NaN
FIRST_RANK = tl.constexpr(-3)
INVALID_ID = tl.constexpr(2**31 - 1)
HEAD = tl.constexpr(4)  # of the list: its length, and padding
_SEAM = tl.constexpr(0o10000)  # the contact of a run with what the tile before has of it

# Argument lists this long fill lines instead of making columns.
# fmt: off
# ---------------------------------------------------------------- join


@triton.jit
def _load_block(ptr, start, lanes, num_voxels, BLOCK: tl.constexpr):
    """The labels of a block, 0 beyond the volume; without a mask where there is none, for loads of 16 bytes."""
    if start + BLOCK <= num_voxels:
        label = tl.load(ptr + start + lanes)
    else:
        label = tl.load(ptr + start + lanes, mask=start + lanes < num_voxels, other=0)
    return label


@triton.jit
def _is_hot(ptr, voxel, there):
    return tl.load(ptr + voxel, mask=there, other=0) > 0


@triton.jit
def _contacts(ptr, voxel, there, before, after, has_left, has_right, LINE: tl.constexpr, DILATED: tl.constexpr):
    """Where the run of a voxel first touches the runs of another line: bits for left of, at and right of ``voxel``.

    ``voxel`` lies in that line, next to the lane's own, whose run has begun ``before`` and goes on ``after``.
    """
    at = _is_hot(ptr, voxel, there)
    left = _is_hot(ptr, voxel - 1, there & has_left)
    contacts = tl.where(at & ((left & before) == 0), 2, 0)
    if DILATED:  # corner to corner, where the two runs do not lie side by side as well
        right = _is_hot(ptr, voxel + 1, there & has_right)
        contacts = contacts | tl.where(left & ((at | before) == 0), 1, 0)
        contacts = contacts | tl.where(right & ((at | after) == 0), 4, 0)
    return at, contacts << (3 * LINE)


@triton.jit
def _offset(contact, width, plane):
    """From a voxel to what it touches, for one of the bits that _contacts sets, or _SEAM."""
    along_x = tl.where((contact & 0o11111) != 0, -1, tl.where((contact & 0o4444) != 0, 1, 0))
    along_y = tl.where((contact & 0o0707) != 0, -width, tl.where((contact & 0o7000) != 0, width, 0))
    along_z = tl.where((contact & 0o7770) != 0, -plane, 0)
    return along_x + along_y + along_z


@triton.jit
def _join_block(
    ptr, start, num_voxels, width, height, plane, REACH: tl.constexpr, PLANES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr
):
    lanes = tl.arange(0, BLOCK)
    label = _load_block(ptr, start, lanes, num_voxels, BLOCK)
    hot = label > 0
    if tl.max(hot.to(tl.int32), 0) > 0:
        voxel = start + lanes
        line = voxel // width
        x = voxel - line * width
        has_left = x > 0
        has_right = x + 1 < width
        y = line % height
        before = _is_hot(ptr, voxel - 1, hot & has_left)
        after = before
        if REACH > 1:
            after = _is_hot(ptr, voxel + 1, hot & has_right)
        todo = tl.where(before & (voxel % TILE == 0), _SEAM, 0)
        above, contacts = _contacts(ptr, voxel - width, hot & (y > 0), before, after, has_left, has_right, 0, REACH > 1)
        todo = todo | contacts
        if PLANES:
            inner = hot & (line >= height)
            behind, contacts = _contacts(ptr, voxel - plane, inner, before, after, has_left, has_right, 1, REACH > 1)
            todo = todo | contacts
            if REACH > 1:  # lines over an edge, unless a voxel that is a neighbour of both has joined them already
                inner = inner & (behind == 0)
                over = inner & (y > 0) & (above == 0)
                _, contacts = _contacts(
                    ptr, voxel - plane - width, over, before, after, has_left, has_right, 2, REACH > 2
                )
                todo = todo | contacts
                over = inner & (y + 1 < height)
                _, contacts = _contacts(
                    ptr, voxel - plane + width, over, before, after, has_left, has_right, 3, REACH > 2
                )
                todo = todo | contacts

        # Each lane joins one contact after the other, lowest bit first: the tree of `ours` and that of `theirs`.
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
            # Linked by another lane before: what that has linked it to is what remains to be joined.
            late = at_roots & (old != large)
            joined = (p == q) | (at_roots & (old == large))
            ours = tl.where(late, old, tl.where(at_roots, small, p))
            todo = tl.where(joined, todo & (todo - 1), todo)
            theirs = tl.where(joined, voxel + _offset(todo & -todo, width, plane), tl.where(late, small, q))


@triton.jit(do_not_specialize=["width", "height", "plane", "num_tiles"])
def components_join_kernel(
    labels_ptr, work_ptr, num_voxels, width, height, plane, num_tiles, stride_row, REACH: tl.constexpr,
    PLANES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """REACH: in how many axes neighbours may differ; PLANES: whether there are three."""
    BLOCKS: tl.constexpr = TILE // BLOCK
    for block in range(tl.program_id(0), tl.load(work_ptr) * BLOCKS, tl.num_programs(0)):
        tile = tl.load(work_ptr + HEAD + block // BLOCKS)
        row = tile // num_tiles
        start = (tile - row * num_tiles).to(labels_ptr.dtype.element_ty) * TILE + block % BLOCKS * BLOCK
        _join_block(
            labels_ptr + row.to(tl.int64) * stride_row, start, num_voxels, width, height, plane, REACH, PLANES, TILE,
            BLOCK
        )


# ---------------------------------------------------------------- rank, scan, number


@triton.jit(do_not_specialize=["num_tiles", "all_tiles"])
def components_rank_kernel(labels_ptr, work_ptr, num_voxels, num_tiles, all_tiles, stride_row, TILE: tl.constexpr):
    lanes = tl.arange(0, TILE)
    for listed in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        tile = tl.load(work_ptr + HEAD + listed)
        row = tile // num_tiles
        start = (tile - row * num_tiles).to(labels_ptr.dtype.element_ty) * TILE
        ptr = labels_ptr + row.to(tl.int64) * stride_row
        label = _load_block(ptr, start, lanes, num_voxels, TILE)
        hot = label > 0
        node = tl.where(hot, label - 1, 0)
        is_root = hot & (node == start + lanes)
        moves = hot & (is_root == 0)
        while tl.max(moves.to(tl.int32), 0) > 0:
            parent = tl.load(ptr + node, mask=moves, other=0, cache_modifier=".cg") - 1
            moves = moves & (parent >= 0) & (parent != node)  # negative: a root that has its rank
            node = tl.where(moves, parent, node)
        upto = tl.cumsum(is_root.to(tl.int32), 0)
        tl.store(work_ptr + HEAD + all_tiles + tile, tl.sum(is_root.to(tl.int32), 0))
        rank = upto - 1
        found = tl.where(is_root, (-rank + FIRST_RANK).to(label.dtype), node + 1)
        tl.store(ptr + start + lanes, found, mask=hot & (found != label))


@triton.jit(do_not_specialize=["num_tiles", "all_tiles"])
def components_scan_kernel(counts_ptr, work_ptr, num_tiles, all_tiles, CHUNK: tl.constexpr):
    """One program per volume."""
    row = tl.program_id(0)
    roots_ptr = work_ptr + HEAD + all_tiles + row.to(tl.int64) * num_tiles
    total = row * 0
    for begin in range(0, num_tiles, CHUNK):
        tiles = begin + tl.arange(0, CHUNK)
        roots = tl.load(roots_ptr + tiles, mask=tiles < num_tiles, other=0)
        upto = tl.cumsum(roots, 0)
        tl.store(roots_ptr + tiles, total + upto - roots, mask=tiles < num_tiles)
        total += tl.sum(roots, 0)
    tl.store(counts_ptr + row, total.to(tl.int64))


@triton.jit(do_not_specialize=["num_tiles", "all_tiles"])
def components_number_kernel(labels_ptr, work_ptr, num_voxels, num_tiles, all_tiles, stride_row, TILE: tl.constexpr):
    lanes = tl.arange(0, TILE)
    for listed in range(tl.program_id(0), tl.load(work_ptr), tl.num_programs(0)):
        tile = tl.load(work_ptr + HEAD + listed)
        row = tile // num_tiles
        start = (tile - row * num_tiles).to(labels_ptr.dtype.element_ty) * TILE
        ptr = labels_ptr + row.to(tl.int64) * stride_row
        label = _load_block(ptr, start, lanes, num_voxels, TILE)
        points = label > 0
        root = tl.where(points, label - 1, start + lanes)
        seen = tl.load(ptr + root, mask=points, other=0)
        seen = tl.where(points, seen, label)  # a rank, or an id already made of it
        ranked = seen <= FIRST_RANK
        roots_ptr = work_ptr + HEAD + all_tiles + row * num_tiles
        roots_before = tl.load(roots_ptr + root // TILE, mask=ranked, other=0)
        found = tl.where(ranked, roots_before + 1 - (seen - FIRST_RANK), seen)
        found = tl.where(label == INVALID, INVALID_ID, found)
        tl.store(ptr + start + lanes, found, mask=points | (label <= INVALID))
# fmt: on
