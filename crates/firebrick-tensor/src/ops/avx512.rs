//! What kernels for AVX-512 share, on vectors of sixteen numbers of 32 bits.

use std::arch::x86_64::*;

/// The lanes of a vector of which `count` values are left.
pub(super) fn mask(count: usize) -> __mmask16 {
    if count < 16 { (1 << count) - 1 } else { !0 }
}

/// Rows as columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(r: [__m512i; 16]) -> [__m512i; 16] {
    // Fours of numbers by fours of rows: number `4 q + n` of rows `4 c..` is part `q` of `fours[c][n]`.
    let mut fours = [[_mm512_setzero_si512(); 4]; 4];
    for (c, fours) in fours.iter_mut().enumerate() {
        let [a, b, c, d] = [r[4 * c], r[4 * c + 1], r[4 * c + 2], r[4 * c + 3]];
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        fours[0] = _mm512_unpacklo_epi64(ab, cd);
        fours[1] = _mm512_unpackhi_epi64(ab, cd);
        let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        fours[2] = _mm512_unpacklo_epi64(ab, cd);
        fours[3] = _mm512_unpackhi_epi64(ab, cd);
    }
    let mut columns = [_mm512_setzero_si512(); 16];
    for n in 0..4 {
        let [a, b, c, d] = [fours[0][n], fours[1][n], fours[2][n], fours[3][n]];
        // Parts 0 and 2, or 1 and 3, of two.
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[n] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        columns[4 + n] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        columns[8 + n] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        columns[12 + n] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
    columns
}
