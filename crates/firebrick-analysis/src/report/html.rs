//! One HTML page, complete in itself.

use std::fmt::Write;

use super::chart::Bars;
use super::color::{hex, ramp};
use super::number::{column, number};
use super::{Cell, Item, Report, Section, Table, plot, svg};

/// `text` with everything HTML gives a meaning to escaped, for elements and quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(' '),
            // Not allowed in HTML, not even as references.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let title = escape(&report.title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>{}</style>\n</head>\n<body>\n<header>\n\
         <button id=\"theme\" type=\"button\" title=\"light or dark\" aria-label=\"switch between light and dark\">◐</button>\n\
         <h1>{title}</h1>\n",
        style()
    );
    for text in &report.summary {
        let _ = writeln!(out, "<p class=\"lead\">{}</p>", escape(text));
    }
    if !report.facts.is_empty() {
        out.push_str("<dl>");
        for (name, value) in &report.facts {
            let _ = write!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
        }
        out.push_str("</dl>\n");
    }
    if report.sections.len() > 2 {
        out.push_str("<nav aria-label=\"sections\">");
        for (i, section) in report.sections.iter().enumerate() {
            let _ = write!(out, "<a href=\"#s{}\">{}</a>", i + 1, escape(&section.title));
        }
        out.push_str("</nav>\n");
    }
    out.push_str("</header>\n<main>\n");
    for (i, section) in report.sections.iter().enumerate() {
        write_section(&mut out, section, i + 1);
    }
    let _ = write!(out, "</main>\n<footer>firebrick {}</footer>\n", env!("CARGO_PKG_VERSION"));
    let _ = write!(out, "<script>{TOGGLE}</script>\n</body>\n</html>\n");
    out
}

fn write_section(out: &mut String, section: &Section, number: usize) {
    let _ = write!(out, "<section id=\"s{number}\">\n<h2>{}</h2>\n", escape(&section.title));
    for item in &section.items {
        match item {
            Item::Text(text) => {
                let _ = writeln!(out, "<p>{}</p>", escape(text));
            }
            Item::Note(text) => {
                let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(text));
            }
            Item::Heatmap(map) => figure(out, &map.title, &svg::heatmap(map)),
            Item::Lines(chart) => figure(out, &chart.title, &svg::lines(chart)),
            Item::Scatter(chart) => figure(out, &chart.title, &plot::scatter(chart)),
            Item::Strips(chart) => figure(out, &chart.title, &plot::strips(chart)),
            Item::Bars(chart) => figure(out, &chart.title, &bars(chart)),
            Item::Table(t) => table(out, t),
        }
    }
    out.push_str("</section>\n");
}

fn figure(out: &mut String, title: &str, body: &str) {
    let _ = writeln!(out, "<figure><figcaption>{}</figcaption>{body}</figure>", escape(title));
}

fn table(out: &mut String, t: &Table) {
    let title = escape(&t.title);
    if t.folded {
        let _ = write!(out, "<details><summary>{title} ({} rows)</summary>", t.rows.len());
    } else {
        let _ = write!(out, "<figure><figcaption>{title}</figcaption>");
    }
    out.push_str("<div class=\"scroll\" tabindex=\"0\"><table><thead><tr>");
    let class = |numeric: bool| if numeric { " class=\"n\"" } else { "" };
    for c in &t.columns {
        let _ = write!(out, "<th{}>{}</th>", class(c.numeric), escape(&c.name));
    }
    out.push_str("</tr></thead><tbody>\n");
    let numbers = |c: usize| -> Vec<f64> {
        let of = |row: &Vec<Cell>| if let Some(Cell::Number(v)) = row.get(c) { Some(*v) } else { None };
        t.rows.iter().filter_map(of).collect()
    };
    let formats: Vec<_> = (0..t.columns.len()).map(|c| column(&numbers(c))).collect();
    for (r, row) in t.rows.iter().enumerate() {
        out.push_str(if t.highlighted.contains(&r) { "<tr class=\"hot\">" } else { "<tr>" });
        for (c, cell) in t.columns.iter().zip(row).enumerate().map(|(i, (c, cell))| ((c, i), cell)) {
            let text = match cell {
                Cell::Number(v) => formats[c.1](*v),
                Cell::Text(text) => escape(text),
                Cell::Empty => "–".into(),
            };
            let _ = write!(out, "<td{}>{text}</td>", class(c.0.numeric));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>");
    out.push_str(if t.folded { "</details>\n" } else { "</figure>\n" });
}

fn bars(chart: &Bars) -> String {
    let ends = chart.bars.iter().flat_map(|b| {
        let error = b.error.unwrap_or(0.0).abs();
        [b.value - error, b.value + error]
    });
    let (low, high) = ends.fold((0.0f64, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
    let percent = |v: f64| if high > low { 100.0 * (v - low) / (high - low) } else { 0.0 };
    let mut out = String::from("<div class=\"bars\">");
    for bar in &chart.bars {
        let (a, b) = (percent(bar.value.min(0.0)), percent(bar.value.max(0.0)));
        let hot = if bar.highlight { " hot" } else { "" };
        let _ = write!(
            out,
            "<div class=\"bar{hot}\"><span class=\"name\">{}</span><span class=\"track\">\
             <i style=\"left:{a:.2}%;width:{:.2}%\"></i>",
            escape(&bar.label),
            b - a
        );
        if let Some(error) = bar.error {
            let (from, to) = (percent(bar.value - error.abs()), percent(bar.value + error.abs()));
            let _ = write!(out, "<b style=\"left:{from:.2}%;width:{:.2}%\"></b>", to - from);
        }
        let error = bar.error.map_or(String::new(), |e| format!(" ± {}", super::number::digits(e, 2)));
        let _ = write!(out, "</span><span class=\"value\">{}{error}</span></div>", number(bar.value));
    }
    out + "</div>"
}

fn style() -> String {
    let stops: Vec<String> = (0..=8).map(|i| hex(ramp(f64::from(i) / 8.0))).collect();
    format!(
        ":root{{color-scheme:light;{LIGHT}}}\
         @media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{DARK}}}}}\
         :root[data-theme=dark]{{color-scheme:dark;{DARK}}}\
         {CSS}.ramp{{background:linear-gradient(90deg,{})}}",
        stops.join(",")
    )
}

const LIGHT: &str = "--bg:#fcfbf9;--card:#fff;--ink:#1c1f23;--soft:#636a72;--line:#e4e1db;--hot:#b4471f;--fill:#8d99a8;--tint:#f6efe9";
const DARK: &str = "--bg:#15181b;--card:#1c2024;--ink:#e7e4de;--soft:#9aa2ab;--line:#30363c;--hot:#f0936b;--fill:#6d7a89;--tint:#2a2420";

const TOGGLE: &str = "document.getElementById('theme').onclick=()=>{const r=document.documentElement,\
d=r.dataset.theme?r.dataset.theme==='dark':matchMedia('(prefers-color-scheme:dark)').matches;\
r.dataset.theme=d?'light':'dark'}";

const CSS: &str = "\
*{box-sizing:border-box}\
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}\
body{margin:0 auto;padding:2.5rem 1.5rem 3rem;max-width:58rem;background:var(--bg);color:var(--ink);\
font:1rem/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;overflow-wrap:anywhere}\
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;font-weight:680;margin:0 3rem .6rem 0;text-wrap:balance}\
h2{font-size:1.25rem;line-height:1.3;letter-spacing:-.01em;font-weight:650;margin:0 0 .6rem}\
p{margin:.6rem 0;max-width:44rem}\
.lead{font-size:1.08rem;color:var(--soft)}\
section{margin-top:2.75rem;padding-top:1.5rem;border-top:1px solid var(--line)}\
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.9rem 1.5rem;margin:1.5rem 0 0}\
dt{font-size:.78rem;color:var(--soft)}\
dd{margin:0;font-weight:550;font-variant-numeric:tabular-nums}\
nav{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;margin-top:1.5rem;font-size:.9rem}\
a{color:var(--hot);text-decoration:none}a:hover{text-decoration:underline}\
.note{border-left:3px solid var(--hot);background:var(--tint);padding:.55rem .9rem;border-radius:0 4px 4px 0;font-size:.93rem}\
figure{margin:1.5rem 0}\
figcaption,summary{font-weight:600;font-size:.95rem;margin-bottom:.5rem}\
summary{cursor:pointer}details{margin:1.5rem 0}\
.scroll{overflow-x:auto;max-width:100%;scrollbar-width:thin}\
.scroll:focus-visible{outline:2px solid var(--hot);outline-offset:3px}\
.heat{display:flex}.heat svg{flex:none}\
.labels{position:sticky;left:0;background:var(--bg)}\
svg{display:block}svg text{fill:var(--ink);font:12px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif}\
svg .tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}\
svg .in{font-size:10.5px;text-anchor:middle;pointer-events:none;font-variant-numeric:tabular-nums}\
svg .none{stroke:var(--line);stroke-dasharray:2 2}\
svg .grid{stroke:var(--line)}svg .curve{fill:none;stroke-width:2;stroke-linejoin:round}\
svg .front{fill:none;stroke:var(--soft);stroke-dasharray:1 3;stroke-linecap:round}\
svg .halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px}\
svg .median{stroke:var(--ink);stroke-width:1.5}\
.key{display:flex;flex-wrap:wrap;align-items:center;gap:.25rem 1rem;margin:.45rem 0 0;font-size:.82rem;color:var(--soft)}\
.key span{display:inline-flex;align-items:center;gap:.4rem}\
.ramp{width:7rem;height:.6rem;border-radius:3px;margin:0 -.4rem}\
table{border-collapse:collapse;overflow-wrap:normal;font-size:.88rem;line-height:1.4}\
th{font-weight:600;text-align:left;vertical-align:bottom;color:var(--soft);font-size:.8rem}\
th,td{padding:.32rem .9rem .32rem 0;border-bottom:1px solid var(--line)}\
th+th,td+td{padding-left:.6rem}\
td{white-space:nowrap}.n{text-align:right;font-variant-numeric:tabular-nums}\
.hot td{font-weight:650;background:var(--tint)}\
.bars{display:grid;grid-template-columns:fit-content(38%) minmax(4rem,1fr) max-content;gap:.4rem .9rem;align-items:center;font-size:.88rem}\
.bar{display:contents}.bar.hot .name,.bar.hot .value{font-weight:650}\
.track{position:relative;height:1.05rem;background:color-mix(in srgb,var(--line) 45%,transparent);border-radius:3px}\
.track i{position:absolute;top:0;bottom:0;background:var(--fill);border-radius:3px}\
.bar.hot .track i{background:var(--hot)}\
.track b{position:absolute;top:50%;height:0;border-top:1.5px solid var(--ink)}\
.value{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}\
footer{margin-top:3rem;padding-top:1rem;border-top:1px solid var(--line);font-size:.8rem;color:var(--soft)}\
#theme{float:right;width:2.1rem;height:2.1rem;border:1px solid var(--line);border-radius:50%;background:var(--card);\
color:var(--ink);font-size:1rem;line-height:1;cursor:pointer}\
@media (max-width:34rem){body{padding:1.25rem 1rem 2rem}h1{font-size:1.5rem}section{margin-top:2rem}\
.bars{grid-template-columns:1fr max-content;gap:.1rem .75rem}.track{grid-column:1/-1;grid-row:auto;margin-bottom:.5rem;order:0}\
.bar{display:grid;grid-template-columns:subgrid;grid-column:1/-1}.name{grid-row:1;grid-column:1}.value{grid-row:1;grid-column:2}.track{grid-row:2}}\
@media print{body{max-width:none;padding:0}#theme,nav{display:none}section,figure{break-inside:avoid}\
section{break-inside:auto}.scroll{overflow:visible}.heat{zoom:.8}\
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}\
@page{margin:16mm}";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Heatmap, Lines, Row, Scatter, Strips};

    /// A name that tries to leave every context a name can stand in.
    const HOSTILE: &str = "\"'></title></style><script>alert(1)</script><img src=x onerror=y>&\u{0}";

    fn hostile() -> Report {
        let map = Heatmap::new(HOSTILE, HOSTILE, 1)
            .columns([HOSTILE.to_string()])
            .row(Row::new(HOSTILE, [Some(1.0)]));
        Report::new(HOSTILE).summary(HOSTILE).fact(HOSTILE, HOSTILE).section(
            Section::new(HOSTILE)
                .text(HOSTILE)
                .note(HOSTILE)
                .heatmap(map)
                .table(Table::new(HOSTILE).text_column(HOSTILE).row([HOSTILE.into()]))
                .table(Table::new(HOSTILE).text_column(HOSTILE).folded())
                .bars(Bars::new(HOSTILE).bar(HOSTILE, 1.0))
                .lines(Lines::new(HOSTILE, HOSTILE, HOSTILE, [1.0, 2.0]).series(HOSTILE, [1.0, 2.0]))
                .scatter(Scatter::new(HOSTILE, HOSTILE, HOSTILE).point(HOSTILE, HOSTILE, 1.0, 2.0).named())
                .strips(Strips::new(HOSTILE, HOSTILE, HOSTILE, [vec![1.0, 2.0]])),
        )
    }

    /// The tags of a page without what stands in quotes.
    fn tags(html: &str) -> Vec<String> {
        let mut tags = Vec::new();
        let (mut tag, mut quoted) = (None::<String>, false);
        for c in html.chars() {
            match (&mut tag, c) {
                (None, '<') => tag = Some(String::new()),
                (Some(_), '"') => quoted = !quoted,
                (Some(t), '>') if !quoted => {
                    tags.push(std::mem::take(t));
                    tag = None;
                }
                (Some(t), c) if !quoted => t.push(c),
                _ => {}
            }
        }
        tags
    }

    #[test]
    fn hostile_names_stay_text() {
        let shape = |report: &Report| tags(&report.to_html());
        let text = serde_json::to_string(&hostile()).unwrap();
        let quoted = serde_json::to_string(HOSTILE).unwrap();
        let tame: Report = serde_json::from_str(&text.replace(&quoted, "\"name\"")).unwrap();
        assert_eq!(shape(&hostile()), shape(&tame), "a name changed the structure of the page");
        let html = hostile().to_html();
        assert!(!html.contains("<img") && !html.contains('\0') && html.matches("<script>").count() == 1);
        // Negative control: the same name unescaped does change the structure.
        let raw = tame.to_html().replace("<td>name</td>", &format!("<td>{HOSTILE}</td>"));
        assert_ne!(tags(&raw), shape(&tame));
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let html = hostile().to_html();
        for forbidden in ["http://", "https://", "src=\"", "@import", "url(", "<link"] {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn numbers_of_a_column_line_up() {
        let mut out = String::new();
        let t = Table::new("t").text_column("a").number_column("b");
        table(
            &mut out,
            &t.row(["x".into(), 1.5.into()]).row(["y".into(), 12.25.into()]).row([f64::NAN.into()]),
        );
        assert!(out.contains("<td class=\"n\">1.50</td>") && out.contains("<td class=\"n\">12.25</td>"));
        assert!(out.ends_with("<td>–</td><td class=\"n\">–</td></tr>\n</tbody></table></div></figure>\n"));
    }

    #[test]
    fn bars_grow_from_zero() {
        let html = bars(&Bars::new("t").bar("loss", -1.0).bar_with_error("gain", 2.0, 1.0));
        assert!(html.contains("left:0.00%;width:25.00%") && html.contains("left:25.00%;width:50.00%"));
        assert!(html.contains("<b style=\"left:50.00%;width:50.00%\">"));
        assert!(bars(&Bars::new("t").bar("nothing", 0.0)).contains("width:0.00%"));
    }
}
