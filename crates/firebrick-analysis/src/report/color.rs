//! Colours, computed: a sequential ramp that is readable for every kind of colour vision and in grey.

/// Curves: Okabe and Ito's palette, darkened where it would vanish on white. Dashes tell them apart as well.
pub(super) const SERIES: [(&str, &str); 7] = [
    ("#0072b2", ""),
    ("#d55e00", "6 3"),
    ("#009e73", "2 3"),
    ("#cc79a7", "8 3 2 3"),
    ("#b8860b", "4 2"),
    ("#56b4e9", "1 2"),
    ("#7a7a7a", "10 4"),
];

/// The colour at `t` in 0..=1: from dark violet over blue and green to light yellow, lightness rising evenly (in Oklab).
pub(super) fn ramp(t: f64) -> [u8; 3] {
    let t = t.clamp(0.0, 1.0);
    let lightness = 0.28 + 0.64 * t;
    let hue = (312.0 - 208.0 * t.powf(0.85)).to_radians();
    let mut chroma: f64 = 0.115 + 0.055 * t;
    // Inside sRGB: less colour, same lightness.
    loop {
        let rgb = oklab(lightness, chroma * hue.cos(), chroma * hue.sin());
        if chroma < 1e-3 || rgb.iter().all(|v| (-1e-6..=1.0 + 1e-6).contains(v)) {
            return rgb.map(|v| (gamma(v.clamp(0.0, 1.0)) * 255.0).round() as u8);
        }
        chroma *= 0.97;
    }
}

/// `#rrggbb`.
pub(super) fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Black or white, whichever is easier to read on `rgb`.
pub(super) fn ink(rgb: [u8; 3]) -> &'static str {
    if luminance(rgb) > 0.18 { "#000" } else { "#fff" }
}

/// Relative luminance (WCAG), 0 to 1.
fn luminance(rgb: [u8; 3]) -> f64 {
    let linear = rgb.map(|v| {
        let v = f64::from(v) / 255.0;
        if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
    });
    0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
}

/// Linear sRGB of an Oklab colour (Ottosson 2020).
fn oklab(l: f64, a: f64, b: f64) -> [f64; 3] {
    let cube = |x: f64| x * x * x;
    let long = cube(l + 0.3963377774 * a + 0.2158037573 * b);
    let medium = cube(l - 0.1055613458 * a - 0.0638541728 * b);
    let short = cube(l - 0.0894841775 * a - 1.2914855480 * b);
    [
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    ]
}

fn gamma(v: f64) -> f64 {
    if v <= 0.0031308 { 12.92 * v } else { 1.055 * v.powf(1.0 / 2.4) - 0.055 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brightness_rises_all_the_way() {
        let steps: Vec<f64> = (0..=64).map(|i| luminance(ramp(f64::from(i) / 64.0))).collect();
        assert!(steps.windows(2).all(|w| w[1] > w[0]), "{steps:?}");
        assert!(steps[0] < 0.04 && steps[64] > 0.75);
        assert_eq!((ink(ramp(0.0)), ink(ramp(1.0))), ("#fff", "#000"));
        assert_eq!((ramp(-3.0), ramp(7.0)), (ramp(0.0), ramp(1.0)));
    }
}
