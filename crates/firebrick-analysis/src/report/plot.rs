//! Points as inline SVG: planes and strips.

use std::fmt::Write;

use super::chart::{Point, Scatter, Strips};
use super::color::SERIES;
use super::html::escape;
use super::number::{digits, number};
use super::svg::{
    ABOVE, BOTTOM, HIGH, LEFT, RIGHT, Scale, WIDE, decades, logarithmic, shorten, steps, thin, width,
};

/// Width of a strip where there are few, and the least one.
const STRIP: [f64; 2] = [40.0, 14.0];

/// The frame: vertical marks with their lines, and the name of the axis.
fn frame(title: &str, y_label: &str, wide: f64, y: &mut Scale) -> String {
    let marks = if y.log { decades(y) } else { steps(y) };
    let mut out = format!(
        "<svg width=\"{wide:.0}\" height=\"{HIGH}\" role=\"img\" aria-label=\"{}\">\
         <text class=\"tick\" x=\"4\" y=\"14\">{}{}</text>",
        escape(title),
        escape(y_label),
        logarithmic(y.log)
    );
    for mark in marks {
        let at = height(y, mark);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            wide - RIGHT,
            LEFT - 8.0,
            at + 4.0,
            digits(mark, 3)
        );
    }
    out
}

fn height(y: &Scale, value: f64) -> f64 {
    HIGH - BOTTOM - y.place(value) * (HIGH - BOTTOM - ABOVE)
}

/// Text under the axis.
fn below(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = escape(text);
    let _ =
        write!(out, "<text class=\"tick\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
}

/// The points that no other beats on both axes, from left to right.
fn front(points: &[Point]) -> Vec<&Point> {
    let mut sorted: Vec<&Point> = points.iter().collect();
    sorted.sort_by(|a, b| a.x.total_cmp(&b.x).then(a.y.total_cmp(&b.y)));
    let mut best = f64::INFINITY;
    sorted.retain(|p| {
        let better = p.y < best;
        best = best.min(p.y);
        better
    });
    sorted
}

/// A mark of kind number `kind` at a place.
fn mark(kind: usize, x: f64, y: f64) -> String {
    let color = SERIES[kind % SERIES.len()].0;
    match kind % 3 {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\" fill=\"{color}\"/>"),
        1 => format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\" fill=\"{color}\"/>",
            x - 4.0,
            y - 4.0
        ),
        _ => format!(
            "<path d=\"M{x:.1} {:.1}L{:.1} {:.1}L{:.1} {:.1}Z\" fill=\"{color}\"/>",
            y - 5.0,
            x + 5.0,
            y + 4.0,
            x - 5.0,
            y + 4.0
        ),
    }
}

/// Points on a plane, with a legend of the kinds.
pub(super) fn scatter(chart: &Scatter) -> String {
    let inside = |p: &&Point| p.x.is_finite() && p.y.is_finite();
    let points: Vec<Point> = chart.points.iter().filter(inside).cloned().collect();
    if points.is_empty() {
        return "<p class=\"key\">no values</p>".into();
    }
    let mut y = Scale::new(points.iter().map(|p| p.y), chart.log);
    let mut out = frame(&chart.title, &chart.y_label, WIDE, &mut y);
    let mut x = Scale::new(points.iter().map(|p| p.x), false);
    let marks = steps(&mut x);
    let across = |v: f64| LEFT + 10.0 + x.place(v) * (WIDE - LEFT - RIGHT - 20.0);
    for mark in marks {
        below(&mut out, across(mark), HIGH - BOTTOM + 18.0, "middle", &number(mark));
    }
    below(&mut out, WIDE - RIGHT, HIGH - 5.0, "end", &chart.x_label);
    if chart.front {
        let path: Vec<String> =
            front(&points).iter().map(|p| format!("{:.1} {:.1}", across(p.x), height(&y, p.y))).collect();
        let _ = write!(out, "<path class=\"front\" d=\"M{}\"/>", path.join("L"));
    }
    let mut kinds: Vec<&str> = Vec::new();
    points.iter().for_each(|p| {
        if !kinds.contains(&p.kind.as_str()) {
            kinds.push(&p.kind);
        }
    });
    let mut taken: Vec<[f64; 4]> = Vec::new();
    let mut names = String::new();
    for p in &points {
        let (cx, cy) = (across(p.x), height(&y, p.y));
        let kind = kinds.iter().position(|k| *k == p.kind).unwrap_or(0);
        let tip =
            format!("{}: {} {}, {} {}", p.label, chart.x_label, number(p.x), chart.y_label, number(p.y));
        let _ = write!(out, "<g>{}<title>{}</title></g>", mark(kind, cx, cy), escape(&tip));
        if p.named {
            name(&mut names, &mut taken, &p.label, cx, cy);
        }
    }
    out.push_str(&names);
    let mut legend = String::new();
    for (i, kind) in kinds.iter().enumerate().filter(|_| kinds.len() > 1) {
        let _ = write!(
            legend,
            "<span><svg width=\"12\" height=\"12\" aria-hidden=\"true\">{}</svg>{}</span>",
            mark(i, 6.0, 6.0),
            escape(kind)
        );
    }
    if chart.front {
        legend.push_str("<span>dotted: no other point is better on both axes</span>");
    }
    format!("<div class=\"scroll\" tabindex=\"0\">{out}</svg></div><p class=\"key\">{legend}</p>")
}

/// Writes a label where no other stands: beside the point, or a little above or below; not at all where there is no room.
fn name(out: &mut String, taken: &mut Vec<[f64; 4]>, label: &str, x: f64, y: f64) {
    let label = &shorten(label, 24);
    let wide = width(label);
    let free = |[l, t, r, b]: [f64; 4]| {
        l > 0.0
            && r < WIDE
            && t > 0.0
            && b < HIGH - BOTTOM + 6.0
            && taken.iter().all(|o| r < o[0] || o[2] < l || b < o[1] || o[3] < t)
    };
    let offsets = [4.0, -10.0, 18.0, -24.0, 32.0, -38.0];
    let places = offsets.iter().flat_map(|dy| [(x + 9.0, y + dy), (x - 9.0 - wide, y + dy)]);
    let place = places.map(|(l, b)| [l, b - 11.0, l + wide, b + 2.0]).find(|p| free(*p));
    if let Some(place) = place {
        taken.push(place);
        let _ = write!(
            out,
            "<text class=\"tick halo\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            place[0],
            place[3] - 2.0,
            escape(label)
        );
    }
}

/// A strip of points for each column, with its median.
pub(super) fn strips(chart: &Strips) -> String {
    let all = || chart.columns.iter().flatten().copied();
    let n = chart.columns.len();
    let mut y = Scale::new(all(), chart.log);
    if y.low > y.high {
        return "<p class=\"key\">no values</p>".into();
    }
    let strip = ((WIDE - LEFT - RIGHT) / n.max(1) as f64).clamp(STRIP[1], STRIP[0]);
    let wide = LEFT + RIGHT + strip * n as f64;
    let mut out = frame(&chart.title, &chart.y_label, wide.max(240.0), &mut y);
    let names: Vec<String> = (0..n).map(|i| i.to_string()).collect();
    let widest = names.iter().map(|s| width(s)).fold(0.0, f64::max) + 6.0;
    for (i, label) in names.iter().enumerate().step_by(thin(n, strip, widest)) {
        below(&mut out, LEFT + strip * (i as f64 + 0.5), HIGH - BOTTOM + 18.0, "middle", label);
    }
    below(&mut out, wide.max(240.0) - RIGHT, HIGH - 5.0, "end", &chart.unit);
    let color = SERIES[0].0;
    for (i, values) in chart.columns.iter().enumerate() {
        let centre = LEFT + strip * (i as f64 + 0.5);
        for (k, value) in values.iter().enumerate() {
            // Side by side, so that equal values do not hide each other.
            let aside = (k as f64 + 0.5) / values.len() as f64 - 0.5;
            let tip = format!("{} {i}, number {k}: {}", chart.unit, number(*value));
            let _ = write!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.4\" fill=\"{color}\" fill-opacity=\".6\"><title>{}</title></circle>",
                centre + 0.6 * strip * aside,
                height(&y, *value),
                escape(&tip)
            );
        }
        if !values.is_empty() {
            let at = height(&y, crate::stats::median(values));
            let _ = write!(
                out,
                "<line class=\"median\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                centre - 0.42 * strip,
                centre + 0.42 * strip
            );
        }
    }
    format!("<div class=\"scroll\" tabindex=\"0\">{out}</svg></div><p class=\"key\">line: median</p>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_what_no_other_point_beats() {
        let chart = Scatter::new("t", "size", "loss")
            .point("a", "small", 1.0, 5.0)
            .point("a", "beaten", 2.0, 6.0)
            .point("b", "middle", 3.0, 2.0)
            .point("b", "same size", 3.0, 4.0)
            .point("b", "large", 9.0, 1.0)
            .point("b", "lost", f64::NAN, 1.0)
            .front();
        let labels: Vec<&str> = front(&chart.points).iter().map(|p| p.label.as_str()).collect();
        assert_eq!(labels, ["small", "middle", "large"]);
        let svg = scatter(&chart);
        assert_eq!((svg.matches("<title>").count(), svg.matches("class=\"front\"").count()), (5, 1));
        assert!(svg.contains(">a</span>") && svg.contains(">b</span>"), "a legend of the kinds");
    }

    #[test]
    fn labels_do_not_lie_on_each_other() {
        let mut chart = Scatter::new("t", "x", "y");
        for i in 0..4 {
            chart = chart.point("a", format!("point number {i}"), 1.0, 1.0 + 1e-6 * f64::from(i));
        }
        let svg = scatter(&chart.point("a", "far", 2.0, 2.0).named());
        let mut places: Vec<&str> =
            svg.split("class=\"tick halo\" ").skip(1).map(|s| s.split('>').next().unwrap()).collect();
        let count = places.len();
        assert_eq!(count, 5);
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), count);
    }

    #[test]
    fn a_strip_has_a_point_for_each_value_and_a_median() {
        let svg =
            strips(&Strips::new("t", "layer", "entropy", [vec![1.0, 2.0, f64::NAN], vec![], vec![3.0]]));
        assert_eq!((svg.matches("<circle").count(), svg.matches("class=\"median\"").count()), (3, 2));
        assert!(strips(&Strips::new("t", "layer", "y", [vec![]])).contains("no values"));
    }
}
