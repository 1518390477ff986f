//! Heat maps and curves as inline SVG.

use std::fmt::Write;

use super::chart::{Heatmap, Lines, Row};
use super::color::{SERIES, hex, ink, ramp};
use super::html::escape;
use super::number::{digits, number};

/// Height of a heat map's cell and of the line above it, in CSS pixels.
const CELL: f64 = 26.0;
const TOP: f64 = 22.0;
/// Width the cells of a heat map share where there are few of them.
const ROOM: f64 = 600.0;

/// Width of a text of 12 px, roughly.
pub(super) fn width(text: &str) -> f64 {
    text.chars().count() as f64 * 6.7
}

/// How a value becomes a place between 0 and 1.
pub(super) struct Scale {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) log: bool,
}

impl Scale {
    pub(super) fn new(values: impl Iterator<Item = f64> + Clone, log: bool) -> Self {
        let log = log && values.clone().all(|v| v > 0.0);
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        Scale { low, high, log }
    }

    pub(super) fn place(&self, value: f64) -> f64 {
        let f = |v: f64| if self.log { v.ln() } else { v };
        let span = f(self.high) - f(self.low);
        if span > 0.0 { (f(value) - f(self.low)) / span } else { 0.5 }
    }
}

/// A heat map: a column of labels that stays in sight, and the cells.
pub(super) fn heatmap(map: &Heatmap) -> String {
    let n = map.columns.len();
    let all = || map.rows.iter().flat_map(|r| r.values.iter().flatten().copied());
    let shared = Scale::new(all(), map.rows.iter().all(|r| r.log));
    let names = map.rows.iter().map(|r| &r.label).chain([&map.unit]);
    let labels = names.map(|r| width(r)).fold(40.0, f64::max).min(230.0) + 18.0;
    let cell = match map.square {
        true => (0.7 * ROOM / n.max(1) as f64).clamp(9.0, 26.0),
        false => (ROOM / n.max(1) as f64).clamp(16.0, 64.0),
    };
    let tall = if map.square { cell } else { CELL };
    let scale = |row: &Row| match map.shared {
        true => Scale { ..shared },
        false => Scale::new(row.values.iter().flatten().copied(), row.log),
    };
    // In all cells or in none.
    let fits = |v: f64| width(&digits(v, 3)) * 0.9 < cell - 5.5;
    let written = n <= 30 && !map.square && all().all(fits);
    let ranges: Vec<String> = map.rows.iter().map(|r| range(&scale(r))).collect();
    let right = if map.shared { 4.0 } else { ranges.iter().map(|r| width(r)).fold(0.0, f64::max) + 14.0 };
    let height = TOP + tall * map.rows.len() as f64 + 2.0;
    let mut out = format!(
        "<svg class=\"labels\" width=\"{labels:.0}\" height=\"{height:.0}\" aria-hidden=\"true\">\
         <text class=\"tick\" x=\"{:.0}\" y=\"14\" text-anchor=\"end\">{}</text>",
        labels - 8.0,
        escape(&map.unit)
    );
    for (i, row) in map.rows.iter().enumerate().step_by(thin(map.rows.len(), tall, 14.0)) {
        let y = TOP + tall * i as f64 + tall / 2.0 + 4.0;
        let text = shorten(&row.label, 34);
        let _ = write!(
            out,
            "<text x=\"{:.0}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>",
            labels - 8.0,
            escape(&text)
        );
    }
    let total = cell * n as f64 + right;
    let _ = write!(
        out,
        "</svg><svg class=\"cells\" width=\"{total:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"{}\">",
        escape(&map.title)
    );
    let widest = map.columns.iter().map(|c| width(c)).fold(0.0, f64::max) + 4.0;
    let step = thin(n, cell, widest);
    for (j, name) in map.columns.iter().enumerate().step_by(step) {
        let x = cell * (j as f64 + 0.5);
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{x:.1}\" y=\"14\" text-anchor=\"middle\">{}</text>",
            escape(name)
        );
    }
    for (i, row) in map.rows.iter().enumerate() {
        let scale = scale(row);
        let y = TOP + tall * i as f64;
        for (j, name) in map.columns.iter().enumerate() {
            let x = cell * j as f64;
            let value = row.values.get(j).copied().flatten();
            let color = value.map(|v| ramp(scale.place(v)));
            let fill = color.map_or("none".to_string(), hex);
            let class = if value.is_none() { " class=\"none\"" } else { "" };
            let shown = value.map_or("no value".to_string(), number);
            let tip = format!("{} {name}, {}: {shown}", map.unit, row.label);
            let gap = if map.square { 0.5 } else { 1.5 };
            let (w, h) = (cell - gap, tall - gap);
            let _ = write!(
                out,
                "<rect{class} x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" rx=\"2\" fill=\"{fill}\">\
                 <title>{}</title></rect>",
                escape(&tip)
            );
            if let (Some(v), Some(rgb)) = (value, color) {
                let text = digits(v, 3);
                if written {
                    let _ = write!(
                        out,
                        "<text class=\"in\" x=\"{:.1}\" y=\"{:.1}\" style=\"fill:{}\">{text}</text>",
                        x + w / 2.0,
                        y + h / 2.0 + 3.8,
                        ink(rgb)
                    );
                }
            }
        }
        if !map.shared {
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                cell * n as f64 + 8.0,
                y + tall / 2.0 + 4.0,
                ranges[i]
            );
        }
    }
    out.push_str("</svg>");
    let key = match map.shared {
        true if shared.low <= shared.high => {
            let (low, high) = (number(shared.low), number(shared.high));
            format!("<p class=\"key\">{low}<span class=\"ramp\"></span>{high}{}</p>", logarithmic(shared.log))
        }
        true => String::new(),
        false => "<p class=\"key\">lowest<span class=\"ramp\"></span>highest of each row</p>".into(),
    };
    format!("<div class=\"scroll heat\" tabindex=\"0\">{out}</div>{key}")
}

fn range(scale: &Scale) -> String {
    match scale.low <= scale.high {
        true => format!("{} – {}{}", digits(scale.low, 3), digits(scale.high, 3), logarithmic(scale.log)),
        false => String::new(),
    }
}

pub(super) fn logarithmic(log: bool) -> &'static str {
    if log { " (log)" } else { "" }
}

pub(super) fn shorten(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['…']).collect(),
        false => text.to_string(),
    }
}

/// Every how-manieth label is shown where each takes `widest` of steps of `step`.
pub(super) fn thin(count: usize, step: f64, widest: f64) -> usize {
    let least = (widest / step).ceil().max(1.0) as usize;
    [1, 2, 5, 10, 20, 50, 100].into_iter().find(|s| *s >= least).unwrap_or(count.max(1))
}

pub(super) const WIDE: f64 = 720.0;
pub(super) const HIGH: f64 = 280.0;
pub(super) const LEFT: f64 = 64.0;
pub(super) const RIGHT: f64 = 18.0;
pub(super) const BOTTOM: f64 = 40.0;
pub(super) const ABOVE: f64 = 28.0;

/// Curves with axes and a legend.
pub(super) fn lines(chart: &Lines) -> String {
    let values = || chart.series.iter().flat_map(|s| s.y.iter().flatten().copied());
    let mut y = Scale::new(values(), chart.log);
    if y.low > y.high || chart.x.is_empty() {
        return "<p class=\"key\">no values</p>".into();
    }
    let marks = if y.log { decades(&mut y) } else { steps(&mut y) };
    let places: Vec<f64> = match chart.even {
        true => (0..chart.x.len()).map(|i| i as f64).collect(),
        false => chart.x.clone(),
    };
    let x = Scale::new(places.iter().copied(), false);
    let px = |v: f64| LEFT + x.place(v) * (WIDE - LEFT - RIGHT);
    let py = |v: f64| HIGH - BOTTOM - y.place(v) * (HIGH - BOTTOM - ABOVE);
    let mut out = format!(
        "<svg width=\"{WIDE}\" height=\"{HIGH}\" role=\"img\" aria-label=\"{}\"><text class=\"tick\" x=\"4\" y=\"14\">{}{}</text>",
        escape(&chart.title),
        escape(&chart.y_label),
        logarithmic(y.log)
    );
    for mark in marks {
        let at = py(mark);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDE - RIGHT,
            LEFT - 8.0,
            at + 4.0,
            digits(mark, 3)
        );
    }
    let names: Vec<(f64, String)> = match chart.even || chart.x.len() <= 12 {
        true => places.iter().zip(&chart.x).map(|(p, v)| (*p, number(*v))).collect(),
        false => {
            let mut span = Scale { ..x };
            let (low, high) = (x.low, x.high);
            let inside = steps(&mut span).into_iter().filter(|v| (low..=high).contains(v));
            inside.map(|v| (v, number(v))).collect()
        }
    };
    let widest = names.iter().map(|n| width(&n.1)).fold(0.0, f64::max) + 8.0;
    let every = thin(names.len(), (WIDE - LEFT - RIGHT) / names.len().max(1) as f64, widest);
    for (place, name) in names.iter().step_by(every) {
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            px(*place),
            HIGH - BOTTOM + 18.0
        );
    }
    let _ = write!(
        out,
        "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        WIDE - RIGHT,
        HIGH - 5.0,
        escape(&chart.x_label)
    );
    let mut legend = String::new();
    for (i, series) in chart.series.iter().enumerate() {
        let (color, dash) = SERIES[i % SERIES.len()];
        let (mut path, mut dots, mut pen) = (String::new(), String::new(), 'M');
        for (k, (place, value)) in places.iter().zip(&series.y).enumerate() {
            let Some(value) = value else {
                pen = 'M';
                continue;
            };
            let (cx, cy) = (px(*place), py(*value));
            let _ = write!(path, "{pen}{cx:.1} {cy:.1}");
            pen = 'L';
            let tip =
                format!("{}, {} {}: {}", series.name, chart.x_label, number(chart.x[k]), number(*value));
            let _ = write!(
                dots,
                "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"2.6\" fill=\"{color}\"><title>{}</title></circle>",
                escape(&tip)
            );
        }
        let dashes = if dash.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dash}\"") };
        let _ = write!(out, "<path class=\"curve\" d=\"{path}\" stroke=\"{color}\"{dashes}/>{dots}");
        let _ = write!(
            legend,
            "<span><svg width=\"28\" height=\"10\" aria-hidden=\"true\"><path class=\"curve\" d=\"M1 5L27 5\" \
             stroke=\"{color}\"{dashes}/></svg>{}</span>",
            escape(&series.name)
        );
    }
    format!("<div class=\"scroll\" tabindex=\"0\">{out}</svg></div><p class=\"key\">{legend}</p>")
}

/// About five round values over the scale, which is widened to hold whole steps; 0 joins if it is near.
pub(super) fn steps(scale: &mut Scale) -> Vec<f64> {
    if scale.low > 0.0 && scale.low < 0.5 * scale.high {
        scale.low = 0.0;
    }
    if scale.high <= scale.low {
        let pad = scale.low.abs().max(1e-12) * 0.5;
        (scale.low, scale.high) = (scale.low - pad, scale.high + pad);
    }
    let raw = (scale.high - scale.low) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw).unwrap_or(raw);
    // A range too narrow or too wide for numbers holds no round ones.
    if !step.is_normal() {
        return vec![scale.low, scale.high];
    }
    let (first, last) = ((scale.low / step).floor() as i64, (scale.high / step).ceil() as i64);
    // Through the decimal text, so that 3 * 0.1 is 0.3.
    let round = |k: i64| format!("{:.12e}", k as f64 * step).parse().unwrap_or(k as f64 * step);
    (scale.low, scale.high) = (round(first), round(last));
    (first..=last).map(round).collect()
}

/// Powers of ten over a logarithmic scale, which is widened to hold them; at most about eight.
pub(super) fn decades(scale: &mut Scale) -> Vec<f64> {
    // Within the powers that are numbers.
    let first = (scale.low.log10().floor() as i32).clamp(-307, 307);
    let last = (scale.high.log10().ceil() as i32).clamp(first + 1, 308);
    (scale.low, scale.high) = (10f64.powi(first), 10f64.powi(last));
    let every = ((last - first) as usize).div_ceil(8).max(1);
    (first..=last).step_by(every).map(|k| 10f64.powi(k)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover() {
        let mut scale = Scale::new([0.13, 0.87].into_iter(), false);
        assert_eq!(steps(&mut scale), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert_eq!((scale.low, scale.high), (0.0, 1.0));
        let mut flat = Scale::new([3.0].into_iter(), false);
        assert!(steps(&mut flat).len() >= 2 && flat.low < 3.0 && flat.high > 3.0);
        let mut log = Scale::new([3e-5, 0.2].into_iter(), true);
        assert_eq!(decades(&mut log).len(), 6);
        assert!(!Scale::new([0.0, 1.0].into_iter(), true).log, "no logarithm of 0");
        for (low, high) in
            [(0.0, 5e-324), (-1e308, 1e308), (f64::MIN, f64::MAX), (0.0, 1e-310), (1.0, f64::MAX)]
        {
            assert!(steps(&mut Scale::new([low, high].into_iter(), false)).len() < 20, "{low} {high}");
            let marks = decades(&mut Scale::new([low.abs().max(5e-324), high].into_iter(), true));
            assert!(marks.len() < 20 && marks.iter().all(|v| v.is_normal()), "{low} {high}: {marks:?}");
        }
    }

    #[test]
    fn cells_follow_the_values_of_their_own_row() {
        let map = Heatmap::new("t", "layer", 2)
            .row(Row::new("a", [Some(1.0), Some(2.0)]))
            .row(Row::new("b", [Some(100.0), None]));
        let svg = heatmap(&map);
        let (low, high) = (hex(ramp(0.0)), hex(ramp(1.0)));
        assert_eq!((svg.matches(&low).count(), svg.matches(&high).count()), (1, 1));
        assert_eq!(svg.matches("class=\"none\"").count(), 1);
        assert!(svg.contains("<title>layer 1, a: 2</title>"));
        // On a shared scale the whole first row is low.
        let shared = heatmap(&map.shared_scale());
        assert!(shared.contains(&high) && !shared.contains("highest of each row"));
    }
}
