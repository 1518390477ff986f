//! Matrix products of operands rounded to bf16, with f32 sums: on AMX tiles or AVX-512 dot products where the processor has them.
//!
//! Both operands are packed into panels of 16 lines (rows of the left, columns of the right one), each a row of blocks of 32 numbers
//! a line, as 16 pairs. A block is a tile: 1 KiB, [line][pair] on the left and [pair][line] on the right. Panels of the left
//! operand in pairs meet panels of the right one in pairs, so that four tiles of sums take what four loads bring.
//!
//! The left operand is packed first, by all threads. The right one, which is a weight in most products and comes from memory, is packed
//! by the task that multiplies by it, a part at a time that stays in the second-level cache: it is read once and never written back. The next
//! part is asked for meanwhile.
//!
//! Every sum runs over its terms in an order that neither the cut into tasks nor the thread count changes.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

use super::awake::{self, Start};
use super::cpu;

/// Lines of a panel.
const LINES: usize = 16;

/// Numbers of a line in a block.
const DEPTH: usize = 32;

/// Sides of the square of sums that is computed at a time.
const SQUARE: usize = 2 * LINES;

/// Blocks of a part, at most: those of two panels stay in the first-level cache while the other operand's pass by.
const BLOCKS: usize = 16;

/// Columns of a task.
const COLUMNS: usize = 128;

/// Pairs of bf16 numbers, the first of each in the low half.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Block([[u32; LINES]; LINES]);

/// Instructions for blocks; only [`Level::all`] makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
}

impl Level {
    /// Those of this processor, the fastest last.
    pub fn all() -> Vec<Level> {
        let mut all = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        if x86::able() {
            all.push(Level::Avx512Bf16);
            #[cfg(target_os = "linux")]
            if x86::amx::allowed() {
                all.push(Level::Amx);
            }
        }
        all
    }

    /// The fastest of this processor.
    pub fn best() -> Level {
        static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().unwrap_or(Level::Portable))
    }

    /// Whether it is faster than products in f32. A processor of Intel's multiplies as many pairs of bf16 numbers in 512 bits a cycle as f32
    /// numbers (0.45 of the rate measured, packing included), one of AMD's twice as many.
    pub fn pays(self) -> bool {
        match self {
            Level::Portable => false,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => std::arch::x86_64::__cpuid(0).ecx == u32::from_le_bytes(*b"cAMD"),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Level::Amx => true,
        }
    }
}

/// Numbers as they lie in memory.
#[derive(Clone, Copy)]
pub(super) enum Numbers<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl Numbers<'_> {
    fn size(self) -> usize {
        match self {
            Numbers::F32(_) => size_of::<f32>(),
            Numbers::Bf16(_) => size_of::<bf16>(),
        }
    }

    /// Where number `i` is.
    fn at(self, i: usize) -> *const u8 {
        match self {
            Numbers::F32(x) => x.as_ptr().wrapping_add(i).cast(),
            Numbers::Bf16(x) => x.as_ptr().wrapping_add(i).cast(),
        }
    }

    fn len(self) -> usize {
        match self {
            Numbers::F32(x) => x.len(),
            Numbers::Bf16(x) => x.len(),
        }
    }

    /// Writes `out.len()` numbers from `at` on as f32.
    fn widen(self, at: usize, out: &mut [f32]) {
        match self {
            Numbers::F32(x) => out.copy_from_slice(&x[at..][..out.len()]),
            Numbers::Bf16(x) => out.iter_mut().zip(&x[at..]).for_each(|(out, x)| *out = x.to_f32()),
        }
    }
}

/// An operand as lines of `depth` numbers: rows of the left one, columns of the right one.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub data: Numbers<'a>,
    pub lines: usize,
    pub depth: usize,
    /// Whether the numbers of a line lie together; otherwise those of all lines at one depth do.
    pub by_line: bool,
}

/// How pairs lie in a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    LineByLine,
    PairByPair,
}

impl Operand<'_> {
    fn blocks(&self) -> usize {
        self.depth.div_ceil(DEPTH)
    }

    /// Writes `out.len()` blocks of the panel that begins at line `first`, from block `from` on, filled up with zeros.
    fn pack(&self, first: usize, from: usize, order: Order, out: &mut [MaybeUninit<Block>], level: Level) {
        assert!(from + out.len() <= self.blocks() && self.data.len() == self.lines * self.depth);
        if level == Level::Portable {
            self.pack_portable(first, from, order, out);
        } else {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level is made only where the processor has these instructions.
            unsafe {
                x86::pack(self, first, from, order, out)
            }
        }
    }

    fn pack_portable(&self, first: usize, from: usize, order: Order, out: &mut [MaybeUninit<Block>]) {
        let lines = LINES.min(self.lines.saturating_sub(first));
        for (block, out) in out.iter_mut().enumerate() {
            let at = (from + block) * DEPTH;
            let depth = DEPTH.min(self.depth - at);
            // As [line][pair] where lines lie together, as [pair][line] otherwise.
            let mut pairs = [[0u32; LINES]; LINES];
            if self.by_line {
                for (line, pairs) in pairs[..lines].iter_mut().enumerate() {
                    let mut numbers = [0.0; DEPTH];
                    self.data.widen((first + line) * self.depth + at, &mut numbers[..depth]);
                    for (p, pair) in pairs.iter_mut().enumerate() {
                        *pair = rounded(numbers[2 * p], numbers[2 * p + 1]);
                    }
                }
            } else if lines > 0 {
                for (p, pairs) in pairs[..depth.div_ceil(2)].iter_mut().enumerate() {
                    let mut numbers = [[0.0; LINES]; 2];
                    for (i, numbers) in numbers.iter_mut().enumerate().take(depth - 2 * p) {
                        self.data.widen((at + 2 * p + i) * self.lines + first, &mut numbers[..lines]);
                    }
                    for (line, pair) in pairs.iter_mut().enumerate() {
                        *pair = rounded(numbers[0][line], numbers[1][line]);
                    }
                }
            }
            if self.by_line != (order == Order::LineByLine) {
                pairs = std::array::from_fn(|i| std::array::from_fn(|j| pairs[j][i]));
            }
            out.write(Block(pairs));
        }
    }
}

/// Two numbers rounded to bf16, ties to even, the first in the low half.
fn rounded(low: f32, high: f32) -> u32 {
    u32::from(bf16::from_f32(low).to_bits()) | u32::from(bf16::from_f32(high).to_bits()) << 16
}

/// Writes `left right` to `out`, `[left.lines, right.lines]` row-major, or adds it to what `out` then has to hold.
pub(super) fn gemm_bf16(
    out: &mut [MaybeUninit<f32>],
    add: bool,
    left: Operand<'_>,
    right: Operand<'_>,
    level: Level,
    threads: usize,
) {
    assert_eq!(left.depth, right.depth, "gemm_bf16: the operands' inner dimensions");
    let (rows, columns, blocks) = (left.lines, right.lines, left.blocks());
    assert!(
        out.len() == rows * columns && blocks > 0,
        "gemm_bf16: the result's size, and a sum of something"
    );
    let squares = rows.div_ceil(SQUARE);
    let mut packed = Vec::<Block>::with_capacity(2 * squares * blocks);
    awake::parts(&mut packed.spare_capacity_mut()[..2 * squares * blocks], blocks, |i, out| {
        left.pack(i * LINES, 0, Order::LineByLine, out, level);
    });
    // SAFETY: the panels are all there is.
    unsafe { packed.set_len(2 * squares * blocks) };
    let product = Product {
        left: &packed,
        right,
        rows,
        // Parts of one size.
        deep: blocks.div_ceil(blocks.div_ceil(BLOCKS)),
        out: Start(out.as_mut_ptr().cast()),
        add,
        level,
    };
    // What does not go round is cut by rows.
    let whole = columns / COLUMNS / threads * threads;
    let mut tasks = Vec::new();
    for (group, first) in (0..columns).step_by(COLUMNS).enumerate() {
        let down = if group < whole { 1 } else { threads.min(squares) };
        let part = |i: usize| i * squares / down..(i + 1) * squares / down;
        tasks.extend((0..down).map(|i| (part(i), first..columns.min(first + COLUMNS))));
    }
    awake::each(tasks, |(squares, across)| {
        // Where tasks take equally long, this thread's next one.
        let next = across.start + threads * COLUMNS;
        let next = (next < columns).then(|| next..columns.min(next + COLUMNS));
        // SAFETY: the tasks share out what `out` has room for, which holds values if they are added to.
        unsafe { product.task(squares.clone(), across.clone(), next) }
    });
}

/// A product under way.
struct Product<'a> {
    /// The panels of the left operand.
    left: &'a [Block],
    right: Operand<'a>,
    rows: usize,
    /// Blocks of a part.
    deep: usize,
    /// `[rows, right.lines]`.
    out: Start<f32>,
    add: bool,
    level: Level,
}

impl Product<'_> {
    /// Rows of some `squares` by some columns; asks for the first part of the `next` columns at its end.
    ///
    /// # Safety
    /// Nobody else may have this part of `out`, which holds values if they are added to.
    unsafe fn task(&self, squares: Range<usize>, across: Range<usize>, next: Option<Range<usize>>) {
        let (columns, blocks) = (self.right.lines, self.right.blocks());
        let pairs = across.len().div_ceil(SQUARE);
        let mut panels = Vec::<Block>::with_capacity(2 * pairs * self.deep);
        let tiles = Tiles::begin(self.level);
        for from in (0..blocks).step_by(self.deep) {
            let count = self.deep.min(blocks - from);
            let add = self.add || from > 0;
            let room = &mut panels.spare_capacity_mut()[..2 * pairs * count];
            for (panel, room) in room.chunks_exact_mut(count).enumerate() {
                self.right.pack(across.start + panel * LINES, from, Order::PairByPair, room, self.level);
            }
            // SAFETY: the panels are all there is.
            let right = unsafe { room.assume_init_ref() };
            let slots = squares.len() * pairs * SLOTS;
            let mut ahead = match (from + count, &next) {
                (from, _) if from < blocks => Ahead::new(&self.right, &across, from, self.deep, slots),
                (_, Some(next)) => Ahead::new(&self.right, next, 0, self.deep, slots),
                _ => Ahead::NONE,
            };
            for square in squares.clone() {
                let left = [0, 1].map(|half| &self.left[(2 * square + half) * blocks + from..][..count]);
                for pair in 0..pairs {
                    let right = [0, 1].map(|half| &right[(2 * pair + half) * count..][..count]);
                    let (row, column) = (square * SQUARE, across.start + pair * SQUARE);
                    let at = self.out.at(row * columns + column);
                    let (height, width) = (SQUARE.min(self.rows - row), SQUARE.min(across.end - column));
                    if [height, width] == [SQUARE; 2] {
                        // SAFETY: the caller's.
                        unsafe { tiles.square(left, right, at, columns, add, &mut ahead) };
                        continue;
                    }
                    let mut sums = [0.0; SQUARE * SQUARE];
                    // SAFETY: a square.
                    unsafe { tiles.square(left, right, sums.as_mut_ptr(), SQUARE, false, &mut ahead) };
                    for (i, sums) in sums.chunks_exact(SQUARE).take(height).enumerate() {
                        for (j, sum) in sums[..width].iter().enumerate() {
                            // SAFETY: the caller's.
                            unsafe {
                                let at = at.add(i * columns + j);
                                at.write(if add { at.read() + sum } else { *sum });
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Times at which a square asks for memory.
const SLOTS: usize = 4;

/// The memory of a part of an operand, in runs of lines of the caches, which is asked for little by little.
struct Ahead {
    /// The first line of the run at hand, how many lines are behind, and those of a run.
    at: *const u8,
    line: usize,
    lines: usize,
    /// Bytes from one run to the next, and runs left.
    stride: usize,
    runs: usize,
    /// Lines asked for at a time.
    every: usize,
}

impl Ahead {
    const NONE: Ahead = Ahead { at: std::ptr::null(), line: 0, lines: 0, stride: 0, runs: 0, every: 0 };

    /// `count` blocks, as far as there are some, of the lines `across`, to be asked for in `slots` times.
    fn new(of: &Operand<'_>, across: &Range<usize>, from: usize, count: usize, slots: usize) -> Self {
        let deep = from * DEPTH..of.depth.min((from + count) * DEPTH);
        let (first, length, between, runs) = match of.by_line {
            true => (across.start * of.depth + deep.start, deep.len(), of.depth, across.len()),
            false => (deep.start * of.lines + across.start, across.len(), of.lines, deep.len()),
        };
        let lines = (of.data.size() * length).div_ceil(cpu::LINE);
        let every = (lines * runs).div_ceil(slots);
        Ahead { at: of.data.at(first), line: 0, lines, stride: of.data.size() * between, runs, every }
    }

    #[inline(always)]
    fn ask(&mut self) {
        for _ in 0..self.every {
            if self.runs == 0 {
                return;
            }
            cpu::prefetch_second(self.at.wrapping_add(self.line * cpu::LINE));
            self.line += 1;
            if self.line == self.lines {
                self.line = 0;
                self.runs -= 1;
                self.at = self.at.wrapping_add(self.stride);
            }
        }
    }
}

/// A thread's access to the instructions of a level.
struct Tiles(Level);

impl Tiles {
    fn begin(level: Level) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if level == Level::Amx {
            // SAFETY: this level is made only where the processor has AMX and the kernel has granted it to this process.
            unsafe { x86::amx::configure() };
        }
        Self(level)
    }

    /// Writes the products of two panels with two, a square, to rows `stride` apart from `out` on, or adds them to what is there.
    ///
    /// # Safety
    /// Nobody else may have the square, which holds values if they are added to.
    unsafe fn square(
        &self,
        left: [&[Block]; 2],
        right: [&[Block]; 2],
        out: *mut f32,
        stride: usize,
        add: bool,
        ahead: &mut Ahead,
    ) {
        let count = left[0].len();
        assert!(count > 0 && [left[1], right[0], right[1]].iter().all(|panel| panel.len() == count));
        // SAFETY: levels are made only where the processor has their instructions; of `out` the caller's; this thread's tiles are configured.
        unsafe {
            match self.0 {
                Level::Portable => portable(left, right, out, stride, add),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Bf16 => x86::square(left, right, out, stride, add, ahead),
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Level::Amx => {
                    (0..SLOTS).for_each(|_| ahead.ask());
                    x86::amx::square(left, right, out, stride, add);
                }
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.0 == Level::Amx {
            // SAFETY: as in `begin`.
            unsafe { x86::amx::release() };
        }
    }
}

/// What the other kernels compute, one pair after the other.
///
/// # Safety
/// As for [`Tiles::square`].
unsafe fn portable(left: [&[Block]; 2], right: [&[Block]; 2], out: *mut f32, stride: usize, add: bool) {
    let number = |pair: u32| (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
    for i in 0..SQUARE {
        for (half, right) in right.iter().enumerate() {
            let at = out.wrapping_add(i * stride + half * LINES).cast::<[f32; LINES]>();
            // SAFETY: the caller's.
            let mut sums = if add { unsafe { at.read() } } else { [0.0; LINES] };
            for (left, right) in left[i / LINES].iter().zip(*right) {
                for (&pair, right) in left.0[i % LINES].iter().zip(&right.0) {
                    let (a, b) = number(pair);
                    for (sum, &pair) in sums.iter_mut().zip(right) {
                        let (low, high) = number(pair);
                        *sum += a * low + b * high;
                    }
                }
            }
            // SAFETY: the caller's.
            unsafe { at.write(sums) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: u32, n: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    fn halves(x: &[f32]) -> Vec<bf16> {
        x.iter().copied().map(bf16::from_f32).collect()
    }

    /// Number `k` of `line` of `operand`, which is f32, rounded where `round` says so.
    fn at(operand: &Operand<'_>, line: usize, k: usize, round: bool) -> f64 {
        let Numbers::F32(x) = operand.data else { panic!("not f32") };
        let x = x[if operand.by_line { line * operand.depth + k } else { k * operand.lines + line }];
        if round { bf16::from_f32(x).to_f64() } else { x.into() }
    }

    #[test]
    fn rounding_is_that_of_bf16() {
        for level in Level::all() {
            for bits in (0..=u32::MAX).step_by(9973) {
                let x = f32::from_bits(bits);
                let operand = Operand { data: Numbers::F32(&[x, -x]), lines: 1, depth: 2, by_line: true };
                let mut block = [MaybeUninit::uninit()];
                operand.pack(0, 0, Order::LineByLine, &mut block, level);
                // SAFETY: just packed.
                let pair = unsafe { block[0].assume_init() }.0[0][0];
                let kept = if x.is_subnormal() && level != Level::Portable { 0.0f32.copysign(x) } else { x };
                let want = [kept, -kept].map(|x| bf16::from_f32(x).to_bits());
                assert_eq!([pair as u16, (pair >> 16) as u16], want, "{x} at {level:?}");
            }
        }
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        let shapes = [
            (1, 1, 1),
            (7, 5, 3),
            (16, 32, 16),
            (33, 31, 65),
            (32, 64, 32),
            (130, 97, 47),
            (257, 130, 33),
            (5, 4700, 18),
            (70, 513, 300),
        ];
        for (m, k, n) in shapes {
            for (left_by_line, right_by_line) in [(true, true), (true, false), (false, true), (false, false)]
            {
                let (a, b) = (numbers(1, m * k), numbers(2, k * n));
                let (a_halves, b_halves) = (halves(&a), halves(&b));
                let left = Operand { data: Numbers::F32(&a), lines: m, depth: k, by_line: left_by_line };
                let right = Operand { data: Numbers::F32(&b), lines: n, depth: k, by_line: right_by_line };
                let product = |round| {
                    let entry = |i: usize| {
                        (0..k).map(|k| at(&left, i / n, k, round) * at(&right, i % n, k, round)).sum()
                    };
                    (0..m * n).map(entry).collect::<Vec<f64>>()
                };
                let (want, exact) = (product(true), product(false));
                for level in Level::all() {
                    let name = format!("[{m}, {k}, {n}] at {level:?}");
                    let run = |out: &mut [f32], add, left, right, threads| {
                        gemm_bf16(cpu::room(out), add, left, right, level, threads);
                    };
                    let mut out = vec![f32::NAN; m * n];
                    run(&mut out, false, left, right, 2);
                    let worst = |want: &[f64]| {
                        out.iter().zip(want).map(|(o, w)| (f64::from(*o) - w).abs()).fold(0.0, f64::max)
                    };
                    let far = worst(&want);
                    assert!(far < 1e-5 * (1.0 + k as f64 / 500.0), "{name}: {far:e}");
                    assert!(worst(&exact) > 1e-5, "control: unrounded, {name}");
                    let once = out.clone();
                    run(&mut out, true, left, right, 2);
                    let apart = |(two, one): (&f32, &f32)| (two - 2.0 * one).abs();
                    assert!(out.iter().zip(&once).map(apart).all(|apart| apart < 1e-4), "adding, {name}");
                    for threads in [1, 3, 16] {
                        run(&mut out, false, left, right, threads);
                        assert!(out == once, "{threads} threads, {name}");
                    }
                    let left_half = Operand { data: Numbers::Bf16(&a_halves), ..left };
                    let right_half = Operand { data: Numbers::Bf16(&b_halves), ..right };
                    for (left, right) in [(left_half, right), (left, right_half), (left_half, right_half)] {
                        run(&mut out, false, left, right, 2);
                        assert!(out == once, "numbers that are bf16 already, {name}");
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn nothing_is_read_or_written_past_the_ends() {
        use super::super::guarded::Guarded;
        for (m, k, n) in [(1, 1, 1), (7, 5, 3), (33, 31, 65), (32, 64, 32), (131, 97, 47)] {
            let (a, b) = (numbers(1, m * k), numbers(2, k * n));
            let (a_end, b_end) = (Guarded::new(&a), Guarded::new(&b));
            let bits = |x: &[f32]| halves(x).iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
            let (a_half, b_half) = (Guarded::new(&bits(&a)), Guarded::new(&bits(&b)));
            for by_line in [true, false] {
                let product = |a, b, out: &mut [f32], level| {
                    let left = Operand { data: a, lines: m, depth: k, by_line };
                    let right = Operand { data: b, lines: n, depth: k, by_line: !by_line };
                    gemm_bf16(cpu::room(out), false, left, right, level, 2);
                };
                for level in Level::all() {
                    let mut out = vec![f32::NAN; m * n];
                    product(Numbers::F32(&a), Numbers::F32(&b), &mut out, level);
                    let at_end = [
                        [Numbers::F32(a_end.slice()), Numbers::F32(b_end.slice())],
                        [a_half.slice(), b_half.slice()].map(|x| Numbers::Bf16(bytemuck::cast_slice(x))),
                    ];
                    for [a, b] in at_end {
                        let mut out_end = Guarded::new(&vec![f32::NAN; m * n]);
                        product(a, b, out_end.slice_mut(), level);
                        assert!(*out_end.slice() == *out, "[{m}, {k}, {n}] at {level:?}");
                    }
                }
            }
        }
        for blocks in [1, 2, 5] {
            let panels: [Guarded<u32>; 4] = std::array::from_fn(|i| {
                let pairs = numbers(i as u32 + 3, blocks * DEPTH * LINES);
                Guarded::new(&pairs.as_chunks().0.iter().map(|[a, b]| rounded(*a, *b)).collect::<Vec<u32>>())
            });
            let [a, b, c, d] = panels.each_ref().map(|panel| {
                let pairs = panel.slice();
                assert!(pairs.as_ptr().cast::<Block>().is_aligned());
                // SAFETY: as many pairs as `blocks` blocks have, any bits of which are some.
                unsafe { std::slice::from_raw_parts(pairs.as_ptr().cast::<Block>(), blocks) }
            });
            let mut want = [0.0; SQUARE * SQUARE];
            // SAFETY: a square.
            unsafe { portable([a, b], [c, d], want.as_mut_ptr(), SQUARE, false) };
            for level in Level::all() {
                for add in [false, true] {
                    let mut sums = Guarded::new(&[if add { 1.0 } else { f32::NAN }; SQUARE * SQUARE]);
                    let mut nothing = Ahead::NONE;
                    let room = sums.slice_mut().as_mut_ptr();
                    // SAFETY: a square of values.
                    unsafe { Tiles::begin(level).square([a, b], [c, d], room, SQUARE, add, &mut nothing) };
                    let plus = if add { 1.0 } else { 0.0 };
                    let far = |(s, w): (&f32, f32)| (s - w - plus).abs();
                    let far = sums.slice().iter().zip(want).map(far).fold(0.0, f32::max);
                    assert!(far < 1e-4, "{blocks} blocks at {level:?}: {far:e}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows() {
        for level in Level::all() {
            for (x, want) in [(f32::INFINITY, f32::INFINITY), (f32::NAN, f32::NAN)] {
                let left = Operand { data: Numbers::F32(&[x, 1.0]), lines: 1, depth: 2, by_line: true };
                let right = Operand { data: Numbers::F32(&[1.0, 1.0]), lines: 1, depth: 2, by_line: true };
                let mut out = [0.0];
                gemm_bf16(cpu::room(&mut out), false, left, right, level, 1);
                assert!(
                    out[0] == want || want.is_nan() && out[0].is_nan(),
                    "{x} at {level:?} gave {}",
                    out[0]
                );
            }
        }
    }
}
