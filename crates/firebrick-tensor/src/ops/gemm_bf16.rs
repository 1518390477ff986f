//! Matrix products of operands rounded to bf16, with f32 sums: on AMX tiles or AVX-512 dot products where the processor has them.
//!
//! Both operands are packed into panels of 16 lines (rows of the left, columns of the right one), each a row of blocks of 32 numbers
//! a line, as 16 pairs. A block is a tile: 1 KiB, [line][pair] on the left and [pair][line] on the right. Panels of the left
//! operand in pairs meet panels of the right one in pairs, so that four tiles of sums take what four loads bring.
//!
//! Every sum runs over its terms in an order that neither the cut into tasks nor the thread count changes.

use rayon::prelude::*;

use super::cpu;

/// Lines of a panel.
const LINES: usize = 16;

/// Numbers of a line in a block.
const DEPTH: usize = 32;

/// Pairs of numbers in a block.
const BLOCK: usize = LINES * DEPTH / 2;

/// Rows of the result that one task computes, at most: what the left operand's part of them leaves in the second-level cache.
const ROWS: usize = 256;

/// Blocks of a panel that are read before the next panel is: the same ones of a task's rows stay in the second-level cache meanwhile.
const BLOCKS: usize = 64;

/// Sides of the square of sums that is computed at a time.
const SQUARE: usize = 2 * LINES;

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
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            all.push(Level::Avx512Bf16);
            #[cfg(target_os = "linux")]
            if amx::allowed() {
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

/// An operand as lines of `depth` numbers: rows of the left one, columns of the right one.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub data: &'a [f32],
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

    /// All panels, an even number of them, filled up with zeros.
    fn pack(&self, order: Order) -> Vec<u32> {
        let panel = self.blocks() * BLOCK;
        let mut out = vec![0; self.lines.div_ceil(SQUARE) * 2 * panel];
        out.par_chunks_mut(panel).enumerate().for_each(|(i, out)| self.pack_panel(i * LINES, order, out));
        out
    }

    fn pack_panel(&self, first: usize, order: Order, out: &mut [u32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            // SAFETY: the processor has these parts of AVX-512.
            return unsafe { self.pack_panel_avx512(first, order, out) };
        }
        self.pack_panel_here(first, order, out);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn pack_panel_avx512(&self, first: usize, order: Order, out: &mut [u32]) {
        self.pack_panel_here(first, order, out);
    }

    #[inline(always)]
    fn pack_panel_here(&self, first: usize, order: Order, out: &mut [u32]) {
        let lines = LINES.min(self.lines.saturating_sub(first));
        if lines == 0 {
            return; // Only fills the number of panels up.
        }
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let at = block * DEPTH;
            let depth = DEPTH.min(self.depth - at);
            // Pairs as [line][pair] where lines lie together, as [pair][line] otherwise.
            let mut pairs = [[0u32; LINES]; LINES];
            if self.by_line {
                for (line, pairs) in pairs[..lines].iter_mut().enumerate() {
                    let mut numbers = [0.0; DEPTH];
                    numbers[..depth].copy_from_slice(&self.data[(first + line) * self.depth + at..][..depth]);
                    for (p, pair) in pairs.iter_mut().enumerate() {
                        *pair = rounded(numbers[2 * p], numbers[2 * p + 1]);
                    }
                }
            } else {
                for (p, pairs) in pairs[..depth.div_ceil(2)].iter_mut().enumerate() {
                    let mut numbers = [[0.0; LINES]; 2];
                    for (i, numbers) in numbers.iter_mut().enumerate().take(depth - 2 * p) {
                        let row = &self.data[(at + 2 * p + i) * self.lines + first..][..lines];
                        numbers[..lines].copy_from_slice(row);
                    }
                    for (line, pair) in pairs.iter_mut().enumerate() {
                        *pair = rounded(numbers[0][line], numbers[1][line]);
                    }
                }
            }
            let (out, _) = out.as_chunks_mut::<LINES>();
            if self.by_line == (order == Order::LineByLine) {
                out.copy_from_slice(&pairs);
            } else {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = std::array::from_fn(|j| pairs[j][i]);
                }
            }
        }
    }
}

/// Two numbers rounded to bf16, ties to even, the first in the low half.
#[inline(always)]
fn rounded(low: f32, high: f32) -> u32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        // A NaN must not become infinite or zero.
        if x.is_nan() { bits | 0x0040_0000 } else { up }
    };
    round(low) >> 16 | round(high) & 0xffff_0000
}

/// `out = left right`, or added to `out`.
///
/// - out: `[left.lines, right.lines]`, row-major
pub(super) fn gemm_bf16(out: &mut [f32], add: bool, left: Operand<'_>, right: Operand<'_>, level: Level) {
    assert_eq!(left.depth, right.depth, "gemm_bf16: the operands' inner dimensions");
    assert_eq!(out.len(), left.lines * right.lines, "gemm_bf16: the result's size");
    let (rows, columns, blocks) = (left.lines, right.lines, left.blocks());
    if out.is_empty() || blocks == 0 {
        if !add {
            out.fill(0.0);
        }
        return;
    }
    let (left, right) = (left.pack(Order::LineByLine), right.pack(Order::PairByPair));
    // Enough tasks for every thread; their size shows in no result.
    let tasks = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(SQUARE).min(ROWS);
    cpu::blocks(out, columns, tasks, |first, out| {
        let tiles = Tiles::begin(level);
        let mut sums = [0.0; SQUARE * SQUARE];
        for from in (0..blocks).step_by(BLOCKS) {
            for j in 0..columns.div_ceil(SQUARE) {
                let right = pair(&right, blocks, j, from);
                let width = SQUARE.min(columns - j * SQUARE);
                for (i, out) in out.chunks_mut(SQUARE * columns).enumerate() {
                    tiles.square(pair(&left, blocks, first / SQUARE + i, from), right, &mut sums);
                    for (row, sums) in out.chunks_exact_mut(columns).zip(sums.chunks_exact(SQUARE)) {
                        let row = &mut row[j * SQUARE..][..width];
                        if add || from > 0 {
                            row.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                        } else {
                            row.copy_from_slice(&sums[..width]);
                        }
                    }
                }
            }
        }
    });
}

/// [`BLOCKS`] blocks or what is left of panels `2 * at` and the next one, from block `from` on.
fn pair(packed: &[u32], blocks: usize, at: usize, from: usize) -> [&[u32]; 2] {
    let count = BLOCKS.min(blocks - from);
    [0, 1].map(|half| &packed[((2 * at + half) * blocks + from) * BLOCK..][..count * BLOCK])
}

/// A thread's access to the instructions of a level.
struct Tiles(Level);

impl Tiles {
    fn begin(level: Level) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if level == Level::Amx {
            // SAFETY: this level is made only where the processor has AMX and the kernel has granted it to this process.
            unsafe { amx::configure() };
        }
        Self(level)
    }

    /// The products of two panels with two: `[32, 32]`.
    fn square(&self, left: [&[u32]; 2], right: [&[u32]; 2], sums: &mut [f32; SQUARE * SQUARE]) {
        let length = left[0].len();
        assert!(
            length.is_multiple_of(BLOCK)
                && length > 0
                && [left[1], right[0], right[1]].iter().all(|p| p.len() == length)
        );
        match self.0 {
            Level::Portable => portable(left, right, sums),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level is made only where the processor has these instructions.
            Level::Avx512Bf16 => unsafe { avx512::square(left, right, sums) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: the panels are whole blocks, `sums` is a square, and this thread's tiles are configured.
            Level::Amx => unsafe { amx::square(left, right, sums) },
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.0 == Level::Amx {
            // SAFETY: as in `begin`.
            unsafe { amx::release() };
        }
    }
}

/// What the other kernels compute, one pair after the other.
fn portable(left: [&[u32]; 2], right: [&[u32]; 2], sums: &mut [f32; SQUARE * SQUARE]) {
    let number = |pair: u32| (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
    sums.fill(0.0);
    for (at, row) in sums.chunks_exact_mut(SQUARE).enumerate() {
        for (right, row) in right.iter().zip(row.chunks_exact_mut(LINES)) {
            let blocks = left[at / LINES].chunks_exact(BLOCK).zip(right.chunks_exact(BLOCK));
            for (left, right) in blocks {
                for (&pair, right) in left[at % LINES * LINES..].iter().zip(right.chunks_exact(LINES)) {
                    let (a, b) = number(pair);
                    for (sum, &pair) in row.iter_mut().zip(right) {
                        let (low, high) = number(pair);
                        *sum += a * low + b * high;
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{BLOCK, LINES, SQUARE};

    /// Rows whose sums stay in registers, with those of both panels of columns.
    const ROWS: usize = 8;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn square(left: [&[u32]; 2], right: [&[u32]; 2], sums: &mut [f32; SQUARE * SQUARE]) {
        // SAFETY: `__m512i` and `__m512bh` are both 64 bytes without a meaning of their own.
        let pairs = |x: __m512i| -> __m512bh { unsafe { std::mem::transmute(x) } };
        for (part, sums) in sums.chunks_exact_mut(ROWS * SQUARE).enumerate() {
            let row = part * ROWS % LINES;
            let mut registers = [[_mm512_setzero_ps(); 2]; ROWS];
            for (at, rows) in left[part * ROWS / LINES].chunks_exact(BLOCK).enumerate() {
                let right = right.map(|panel| &panel[at * BLOCK..][..BLOCK]);
                for p in 0..LINES {
                    // SAFETY: 16 pairs from here on are in each block.
                    let columns =
                        right.map(|b| pairs(unsafe { _mm512_loadu_si512(b.as_ptr().add(p * LINES).cast()) }));
                    for (r, sums) in registers.iter_mut().enumerate() {
                        let row = pairs(_mm512_set1_epi32(rows[(row + r) * LINES + p] as i32));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = _mm512_dpbf16_ps(*sum, row, column);
                        }
                    }
                }
            }
            for (sums, registers) in sums.chunks_exact_mut(SQUARE).zip(registers) {
                for (half, register) in sums.chunks_exact_mut(LINES).zip(registers) {
                    // SAFETY: `half` has 16 numbers.
                    unsafe { _mm512_storeu_ps(half.as_mut_ptr(), register) };
                }
            }
        }
    }
}

/// Tiles of the Advanced Matrix Extensions: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    use super::{BLOCK, SQUARE};

    /// Whether the processor has bf16 tiles and the operating system lets this process use them.
    pub fn allowed() -> bool {
        const TILES: u32 = 1 << 22 | 1 << 24; // CPUID 7, EDX: amx-bf16 and amx-tile
        const STATE: u64 = 3 << 17; // XCR0: configuration and data of tiles
        let present = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILES == TILES;
        // SAFETY: `xgetbv` exists where the operating system says so.
        let kept = __cpuid(1).ecx >> 27 & 1 == 1 && unsafe { xgetbv() } & STATE == STATE;
        present && kept && granted()
    }

    #[target_feature(enable = "xsave")]
    fn xgetbv() -> u64 {
        // SAFETY: register 0 always exists.
        unsafe { _xgetbv(0) }
    }

    /// Asks Linux for the state of tiles, once for the process and all its later threads.
    fn granted() -> bool {
        const ARCH_PRCTL: u64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XTILE_DATA: u64 = 18;
        let result: i64;
        // SAFETY: this system call reads and writes no memory of ours.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XTILE_DATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// Makes all eight tiles 16 rows of 64 bytes.
    ///
    /// # Safety
    /// [`allowed`] holds.
    pub unsafe fn configure() {
        let mut tiles =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        tiles.row_bytes[..8].fill(64);
        tiles.rows[..8].fill(16);
        // SAFETY: reads the 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &tiles, options(nostack, readonly, preserves_flags)) };
    }

    /// Leaves the tiles, so that nothing has to save them any more.
    ///
    /// # Safety
    /// [`allowed`] holds.
    pub unsafe fn release() {
        // SAFETY: touches tiles alone.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }

    /// # Safety
    /// This thread has called [`configure`]; `left` and `right` are panels of equally many whole blocks, at least one.
    pub unsafe fn square(left: [&[u32]; 2], right: [&[u32]; 2], sums: &mut [f32; SQUARE * SQUARE]) {
        let blocks = left[0].len() / BLOCK;
        // SAFETY: the loop reads `blocks` blocks of 1 KiB of each panel, the stores write four quarters of the square.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a0} + {line}]",
                "tileloadd tmm6, [{b0} + {line}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 1024",
                "add {a1}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{c} + {row}], tmm0",
                "tilestored [{c} + {row} + 64], tmm1",
                "tilestored [{d} + {row}], tmm2",
                "tilestored [{d} + {row} + 64], tmm3",
                a0 = inout(reg) left[0].as_ptr() => _,
                a1 = inout(reg) left[1].as_ptr() => _,
                b0 = inout(reg) right[0].as_ptr() => _,
                b1 = inout(reg) right[1].as_ptr() => _,
                blocks = inout(reg) blocks => _,
                line = in(reg) 64usize,
                c = in(reg) sums.as_mut_ptr(),
                d = in(reg) sums.as_mut_ptr().add(SQUARE * SQUARE / 2),
                row = in(reg) 4 * SQUARE,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
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

    fn bf16(x: f32) -> f64 {
        half::bf16::from_f32(x).to_f64()
    }

    /// Numbers of `operand`, rounded where `round` says so.
    fn at(operand: &Operand<'_>, line: usize, k: usize, round: bool) -> f64 {
        let x = match operand.by_line {
            true => operand.data[line * operand.depth + k],
            false => operand.data[k * operand.lines + line],
        };
        if round { bf16(x) } else { x.into() }
    }

    #[test]
    fn rounding_is_that_of_bf16() {
        for bits in (0..=u32::MAX).step_by(9973) {
            let x = f32::from_bits(bits);
            let pair = rounded(x, -x);
            assert_eq!(pair as u16, half::bf16::from_f32(x).to_bits(), "{x}");
            assert_eq!((pair >> 16) as u16, half::bf16::from_f32(-x).to_bits(), "{x}");
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
        ];
        for (m, k, n) in shapes {
            for (left_by_line, right_by_line) in [(true, true), (true, false), (false, true), (false, false)]
            {
                let (a, b) = (numbers(1, m * k), numbers(2, k * n));
                let left = Operand { data: &a, lines: m, depth: k, by_line: left_by_line };
                let right = Operand { data: &b, lines: n, depth: k, by_line: right_by_line };
                let product = |round| {
                    let entry = |i: usize| {
                        (0..k).map(|k| at(&left, i / n, k, round) * at(&right, i % n, k, round)).sum()
                    };
                    (0..m * n).map(entry).collect::<Vec<f64>>()
                };
                let (want, exact) = (product(true), product(false));
                for level in Level::all() {
                    let mut out = vec![f32::NAN; m * n];
                    gemm_bf16(&mut out, false, left, right, level);
                    let worst = |want: &[f64]| {
                        out.iter().zip(want).map(|(o, w)| (f64::from(*o) - w).abs()).fold(0.0, f64::max)
                    };
                    assert!(
                        worst(&want) < 1e-5 * (1.0 + k as f64 / 500.0),
                        "[{m}, {k}, {n}] at {level:?}: {:e}",
                        worst(&want)
                    );
                    assert!(worst(&exact) > 1e-5, "control: unrounded, [{m}, {k}, {n}]");
                    let once = out.clone();
                    gemm_bf16(&mut out, true, left, right, level);
                    let apart = |(two, one): (&f32, &f32)| (two - 2.0 * one).abs();
                    assert!(out.iter().zip(&once).map(apart).all(|apart| apart < 1e-4), "adding");
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                    pool.install(|| gemm_bf16(&mut out, false, left, right, level));
                    assert_eq!(out, once, "threads");
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
            for by_line in [true, false] {
                let product = |a, b, out: &mut [f32], level| {
                    let left = Operand { data: a, lines: m, depth: k, by_line };
                    let right = Operand { data: b, lines: n, depth: k, by_line: !by_line };
                    gemm_bf16(out, false, left, right, level);
                };
                for level in Level::all() {
                    let mut out = vec![f32::NAN; m * n];
                    product(&a, &b, &mut out, level);
                    let mut out_end = Guarded::new(&vec![f32::NAN; m * n]);
                    product(a_end.slice(), b_end.slice(), out_end.slice_mut(), level);
                    assert!(*out_end.slice() == *out, "[{m}, {k}, {n}] at {level:?}");
                }
            }
        }
        for blocks in [1, 2, 5] {
            let panels: [Guarded<u32>; 4] = std::array::from_fn(|i| {
                let pairs = numbers(i as u32 + 3, blocks * DEPTH * LINES);
                Guarded::new(&pairs.as_chunks().0.iter().map(|[a, b]| rounded(*a, *b)).collect::<Vec<u32>>())
            });
            let [a, b, c, d] = panels.each_ref().map(Guarded::slice);
            let mut want = [0.0; SQUARE * SQUARE];
            portable([a, b], [c, d], &mut want);
            for level in Level::all() {
                let mut sums = Guarded::new(&[f32::NAN; SQUARE * SQUARE]);
                let room = sums.slice_mut().try_into().expect("a square");
                Tiles::begin(level).square([a, b], [c, d], room);
                let far = sums.slice().iter().zip(want).map(|(s, w)| (s - w).abs()).fold(0.0, f32::max);
                assert!(far < 1e-4, "{blocks} blocks at {level:?}: {far:e}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows() {
        for level in Level::all() {
            for (x, want) in [(f32::INFINITY, f32::INFINITY), (f32::NAN, f32::NAN)] {
                let a = [x, 1.0];
                let left = Operand { data: &a, lines: 1, depth: 2, by_line: true };
                let right = Operand { data: &[1.0, 1.0], lines: 1, depth: 2, by_line: true };
                let mut out = [0.0];
                gemm_bf16(&mut out, false, left, right, level);
                assert!(
                    out[0] == want || want.is_nan() && out[0].is_nan(),
                    "{x} at {level:?} gave {}",
                    out[0]
                );
            }
        }
    }
}
