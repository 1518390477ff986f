//! Numbers as a reader wants them.

/// Four significant digits, thousands apart, a power of ten where there would be many zeros: `0.01235`, `1,234,567`, `1.200e−7`.
pub fn number(value: f64) -> String {
    digits(value, 4)
}

/// `value` to so many significant digits; whole numbers below 10^15 in full.
pub(super) fn digits(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let size = value.abs();
    if value == 0.0 {
        return "0".into();
    }
    if value.fract() == 0.0 && size < 1e15 {
        return grouped(format!("{value:.0}"));
    }
    if !(1e-3..1e6).contains(&size) {
        return scientific(value, digits);
    }
    let places = (digits as i32 - 1 - size.log10().floor() as i32).max(0) as usize;
    let text = format!("{value:.places$}");
    grouped(if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text })
}

fn scientific(value: f64, digits: usize) -> String {
    let places = digits.saturating_sub(1);
    sign(format!("{value:.places$e}"))
}

fn sign(text: String) -> String {
    text.replace('-', "\u{2212}")
}

/// Commas between groups of three digits, a true minus.
fn grouped(text: String) -> String {
    let (negative, rest) = text.strip_prefix('-').map_or((false, text.as_str()), |r| (true, r));
    let (whole, fraction) = rest.split_once('.').map_or((rest, None), |(w, f)| (w, Some(f)));
    let mut out = String::from(if negative { "\u{2212}" } else { "" });
    for (i, c) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(c);
    }
    if let Some(fraction) = fraction {
        out.push('.');
        out.push_str(fraction);
    }
    out
}

/// How to write all numbers of a column so that their digits line up.
pub(super) fn column(values: &[f64]) -> impl Fn(f64) -> String + use<> {
    let sizes = || values.iter().map(|v| v.abs()).filter(|v| *v > 0.0);
    let (small, large) = (sizes().fold(f64::INFINITY, f64::min), sizes().fold(0.0, f64::max));
    let whole = values.iter().all(|v| v.fract() == 0.0) && large < 1e15;
    let wide = large >= 1e7 || (large > 0.0 && (large < 1e-3 || small < large * 1e-5));
    let places = if whole || large == 0.0 {
        0
    } else {
        let of = |digits: i32, size: f64| digits - 1 - size.log10().floor() as i32;
        of(4, large).max(of(2, small)).clamp(0, 7) as usize
    };
    move |v| match () {
        () if !v.is_finite() => "–".into(),
        () if wide && !whole => scientific(v, 4),
        () => grouped(format!("{v:.places$}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let cases = [
            (0.0, "0"),
            (1234567.0, "1,234,567"),
            (-12.0, "\u{2212}12"),
            (0.012345, "0.01235"),
            (1234.56, "1,235"),
            (0.5, "0.5"),
            (1.2e-7, "1.200e\u{2212}7"),
            (2.5e9 + 0.5, "2.500e9"),
            (f64::NAN, "–"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn columns_line_up() {
        let values = [0.5, 12.25, 3.0];
        let format = column(&values);
        assert_eq!(values.map(&format), ["0.50", "12.25", "3.00"]);
        assert_eq!(column(&[1.0, 2000.0])(2000.0), "2,000");
        assert_eq!(column(&[1e-9, 1.5])(1e-9), "1.000e\u{2212}9");
        assert_eq!(column(&[])(f64::INFINITY), "–");
    }
}
