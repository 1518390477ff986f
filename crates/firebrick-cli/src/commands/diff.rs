//! `firebrick diff`.

use anyhow::Result;
use clap::Args;
use firebrick_core::Progress;
use firebrick_models::{Diff as Found, TensorDiff, ValueDiff, diff, diff_checkpoints};
use firebrick_tensor::checkpoint::Checkpoint;

use crate::args::{Global, Usage};
use crate::models;
use crate::ui::Terminal;

/// Tensors that are named in the text; `--json` has them all.
const SHOWN: usize = 10;

#[derive(Args)]
pub struct Diff {
    /// Model or checkpoint: a folder, a .gguf or .safetensors file, `embedded`, or a fetched name.
    #[arg(value_name = "A")]
    a: String,
    /// What to compare it with, in the same or another format.
    #[arg(value_name = "B")]
    b: String,
}

impl Diff {
    pub fn run(&self, _global: &Global, terminal: &Terminal) -> Result<()> {
        let found = match models::open(&self.a).and_then(|a| Ok((a, models::open(&self.b)?))) {
            Ok((a, b)) => diff(&a, &b, terminal)?,
            Err(why) => self.by_name(why, terminal)?,
        };
        terminal.result(&found, || text(&found))
    }

    /// For files that are no models, or of architectures that are not known here.
    fn by_name(&self, why: anyhow::Error, terminal: &Terminal) -> Result<Found> {
        let open = |name: &str| Checkpoint::open(models::locate(name).ok()?).ok();
        let (Some(a), Some(b)) = (open(&self.a), open(&self.b)) else { return Err(why) };
        if why.is::<Usage>() {
            return Err(why);
        }
        terminal.say(&format!("comparing tensors by name: {why}"));
        Ok(diff_checkpoints(&a, &b, terminal as &dyn Progress)?)
    }
}

fn text(found: &Found) -> String {
    let mut text = String::new();
    for (which, names) in [("A", &found.only_a), ("B", &found.only_b)] {
        if !names.is_empty() {
            let more = if names.len() > SHOWN { ", ..." } else { "" };
            let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
            text += &format!("only in {which}: {} tensors: {shown}{more}\n", names.len());
        }
    }
    let stored = |t: &TensorDiff| t.a.dtype != t.b.dtype || t.a.shape != t.b.shape;
    let changed: Vec<&TensorDiff> = found.tensors.iter().filter(|t| stored(t)).collect();
    if !changed.is_empty() {
        text += &format!("{} tensors are stored otherwise:\n", changed.len());
        for t in changed.iter().take(SHOWN) {
            let (a, b) = (&t.a, &t.b);
            text += &format!("  {:40} {} {:?} -> {} {:?}\n", a.name, a.dtype, a.shape, b.dtype, b.shape);
        }
        if changed.len() > SHOWN {
            text += "  ...\n";
        }
    }
    let identical = found.tensors.iter().filter(|t| t.identical).count();
    text += &format!("{} tensors in both, {identical} identical\n", found.tensors.len());
    text += &format!("{:40} {:>10} {:>10} {:>12}\n", "", "max |a-b|", "relative", "cosine");
    text += &line("all", &found.total);
    for sum in found.parts.iter().chain(&found.layers) {
        text += &line(&sum.of, &sum.values);
    }
    let differ = |t: &&TensorDiff| t.values.is_some_and(|v| v.max_abs > 0.0 || v.not_finite > 0);
    let mut worst: Vec<&TensorDiff> = found.tensors.iter().filter(differ).collect();
    let finite = |v: &ValueDiff| v.not_finite == 0;
    let size = |t: &TensorDiff| t.values.filter(finite).and_then(|v| v.relative).unwrap_or(f64::INFINITY);
    worst.sort_by(|a, b| size(b).total_cmp(&size(a)));
    if worst.len() > 1 {
        text += &format!("the farthest of {} tensors that differ:\n", worst.len());
        text += &worst
            .iter()
            .take(SHOWN)
            .filter_map(|t| Some(line(&t.a.name, t.values.as_ref()?)))
            .collect::<String>();
    }
    text
}

fn line(name: &str, v: &ValueDiff) -> String {
    let number = |x: Option<f64>, digits| x.map_or("-".to_string(), |x| format!("{x:.digits$}"));
    let relative = v.relative.map_or("-".to_string(), |x| format!("{x:.3e}"));
    let broken = match v.not_finite {
        0 => String::new(),
        n => format!("  {n} not finite"),
    };
    format!("{name:40} {:>10.3e} {relative:>10} {:>12}{broken}\n", v.max_abs, number(v.cosine, 8))
}
