//! Blocks of bf16 numbers packed and multiplied with AVX-512, or multiplied on tiles.

use std::arch::x86_64::*;
use std::mem::{MaybeUninit, transmute};

use super::super::avx512::{mask, transposed};
use super::{Ahead, Block, DEPTH, LINES, Numbers, Operand, Order, SLOTS, SQUARE};

/// Whether the processor has what [`pack`] and [`square`] take.
pub fn able() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// [`Operand::pack`]. Numbers too small for a whole mantissa become zero, as they do in products.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pack(operand: &Operand<'_>, first: usize, from: usize, order: Order, out: &mut [MaybeUninit<Block>]) {
    let Operand { data, lines, depth, by_line } = *operand;
    let count = LINES.min(lines.saturating_sub(first));
    for (block, out) in out.iter_mut().enumerate() {
        let at = (from + block) * DEPTH;
        let deep = DEPTH.min(depth - at);
        // As [line][pair] where lines lie together, as [pair][line] otherwise.
        let mut pairs = [_mm512_setzero_si512(); LINES];
        if by_line {
            for (line, pairs) in pairs[..count].iter_mut().enumerate() {
                // SAFETY: `deep` numbers of a line.
                *pairs = unsafe { line_of(data, (first + line) * depth + at, deep) };
            }
        } else if count > 0 {
            for (p, pairs) in pairs[..deep.div_ceil(2)].iter_mut().enumerate() {
                let (at, other) = ((at + 2 * p) * lines + first, if 2 * p + 1 < deep { count } else { 0 });
                // SAFETY: `count` lines at one depth, and at the next one if there is one.
                *pairs = unsafe { pairs_of(data, [at, at + lines], [count, other]) };
            }
        }
        if by_line != (order == Order::LineByLine) {
            pairs = transposed(pairs);
        }
        // SAFETY: both are 1 KiB of numbers that any bits are.
        out.write(unsafe { transmute::<[__m512i; LINES], Block>(pairs) });
    }
}

/// 32 numbers from `at` on, of which the first `count` are there.
///
/// # Safety
/// They have to be.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn line_of(data: Numbers<'_>, at: usize, count: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        match data {
            Numbers::F32(x) => {
                let x = x.as_ptr().wrapping_add(at);
                let low = _mm512_maskz_loadu_ps(mask(count), x);
                let high = _mm512_maskz_loadu_ps(mask(count.saturating_sub(LINES)), x.wrapping_add(LINES));
                transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            }
            Numbers::Bf16(x) => {
                let there = if count < DEPTH { (1 << count) - 1 } else { !0 };
                _mm512_maskz_loadu_epi16(there, x.as_ptr().wrapping_add(at).cast())
            }
        }
    }
}

/// Pairs of 16 numbers from each of `at` on, of which the first `counts` are there.
///
/// # Safety
/// They have to be.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pairs_of(data: Numbers<'_>, at: [usize; 2], counts: [usize; 2]) -> __m512i {
    /// 0, 16, 1, 17, ...
    const TURNS: [u16; DEPTH] = {
        let mut turns = [0; DEPTH];
        let mut i = 0;
        while i < DEPTH {
            turns[i] = (i / 2 + i % 2 * LINES) as u16;
            i += 1;
        }
        turns
    };
    // SAFETY: the caller's.
    unsafe {
        let one_after_the_other = match data {
            Numbers::F32(x) => {
                let number =
                    |i: usize| _mm512_maskz_loadu_ps(mask(counts[i]), x.as_ptr().wrapping_add(at[i]));
                transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(number(1), number(0)))
            }
            Numbers::Bf16(x) => {
                let number = |i: usize| {
                    let from = x.as_ptr().wrapping_add(at[i]).cast();
                    // Their mask is of 32 numbers: those past the sixteenth are none of a half's.
                    _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(mask(counts[i]).into(), from))
                };
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(number(0)), number(1))
            }
        };
        _mm512_permutexvar_epi16(transmute::<[u16; DEPTH], __m512i>(TURNS), one_after_the_other)
    }
}

/// Rows whose sums stay in registers, with those of both panels of columns.
const ROWS: usize = SQUARE / SLOTS;

/// # Safety
/// As for [`Tiles::square`](super::Tiles::square).
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn square(
    left: [&[Block]; 2],
    right: [&[Block]; 2],
    out: *mut f32,
    stride: usize,
    add: bool,
    ahead: &mut Ahead,
) {
    // SAFETY: `__m512i` and `__m512bh` are both 64 bytes without a meaning of their own.
    let pairs = |x: __m512i| unsafe { transmute::<__m512i, __m512bh>(x) };
    for part in 0..SQUARE / ROWS {
        ahead.ask();
        let at = |r: usize, half: usize| out.wrapping_add((part * ROWS + r) * stride + half * LINES);
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        if add {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (half, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's.
                    *sums = unsafe { _mm512_loadu_ps(at(r, half)) };
                }
            }
        }
        let blocks = left[part * ROWS / LINES].iter().zip(right[0].iter().zip(right[1]));
        for (left, (one, other)) in blocks {
            let rows = left.0[part * ROWS % LINES..].first_chunk::<ROWS>().expect("a part of a panel");
            for p in 0..LINES {
                // SAFETY: sixteen pairs.
                let columns =
                    [one, other].map(|b| pairs(unsafe { _mm512_load_si512(b.0[p].as_ptr().cast()) }));
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let row = pairs(_mm512_set1_epi32(row[p] as i32));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, row, column);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (half, sums) in sums.into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { _mm512_storeu_ps(at(r, half), sums) };
            }
        }
    }
}

/// Tiles of the Advanced Matrix Extensions: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
#[cfg(target_os = "linux")]
pub mod amx {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    use super::{Block, LINES};

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
    /// This thread has called [`configure`]; `left` and `right` are panels of equally many blocks, at least one; of `out` as for
    /// [`Tiles::square`](super::super::Tiles::square).
    pub unsafe fn square(left: [&[Block]; 2], right: [&[Block]; 2], out: *mut f32, stride: usize, add: bool) {
        // SAFETY: the loop reads `blocks` blocks of 1 KiB of each panel; the rest reads and writes four quarters of the square.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jz 3f",
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 64]",
                "tileloadd tmm2, [{d} + {row}]",
                "tileloadd tmm3, [{d} + {row} + 64]",
                "jmp 2f",
                "3:",
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
                blocks = inout(reg) left[0].len() => _,
                add = in(reg) u64::from(add),
                line = in(reg) 64usize,
                c = in(reg) out,
                d = in(reg) out.wrapping_add(LINES * stride),
                row = in(reg) size_of::<f32>() * stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
