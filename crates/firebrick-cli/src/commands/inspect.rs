//! `firebrick inspect`.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use firebrick_core::Part;
use firebrick_models::ModelFiles;
use serde_json::json;

use crate::args::Global;
use crate::models;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Inspect {
    /// Model: a folder, a .gguf file, `embedded`, or a fetched name.
    #[arg(value_name = "M")]
    model: String,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
}

impl Inspect {
    pub fn run(&self, _global: &Global, terminal: &Terminal) -> Result<()> {
        let files = models::open(&self.model)?;
        let mut types = BTreeMap::<&str, (usize, usize, usize)>::new();
        for t in files.checkpoint.tensors() {
            let entry = types.entry(t.dtype.name()).or_default();
            *entry = (entry.0 + 1, entry.1 + t.elements(), entry.2 + t.len);
        }
        let parameters: usize = types.values().map(|t| t.1).sum();
        let bytes: usize = types.values().map(|t| t.2).sum();
        let tensors: Vec<_> = files
            .checkpoint
            .tensors()
            .iter()
            .map(|t| json!({"name": t.name, "type": t.dtype.name(), "shape": t.shape, "bytes": t.len}))
            .collect();
        let sites: Vec<_> = files.sites().entries().iter().filter(|e| e.tensor.is_some()).collect();
        let config = &files.config;
        let output = json!({
            "name": files.name,
            "config": config,
            "parameters": parameters,
            "bytes": bytes,
            "types": types,
            "vocab": files.tokenizer.vocab_size(),
            "chat_template": files.tokenizer.chat_template().is_some(),
            "sites": sites,
            "tensors": tensors,
        });
        terminal.result(&output, || {
            let mut text = format!(
                "{} ({})\n  {} layers, d_model {}, d_ff {}, {} heads of {} ({} key-value), vocabulary {}{}\n  {:.1} M parameters, {:.1} MB\n",
                files.name,
                config.model_type,
                config.layers,
                config.d_model,
                config.d_ff,
                config.heads,
                config.head_dim,
                config.kv_heads,
                config.vocab,
                if config.tied_head { ", tied head" } else { "" },
                parameters as f64 / 1e6,
                bytes as f64 / 1e6,
            );
            for (name, (count, elements, bytes)) in &types {
                text += &format!("  {name:5} {count:4} tensors {elements:>12} values {bytes:>12} bytes\n");
            }
            for (part, (d_in, d_out), count) in linears(&files) {
                text += &format!("  {:9} {count:4} sites   {d_in} -> {d_out}\n", part.name());
            }
            if self.tensors {
                for t in files.checkpoint.tensors() {
                    text += &format!("  {:50} {:5} {:?}\n", t.name, t.dtype.name(), t.shape);
                }
            }
            text
        })
    }
}

/// The linear layers by part and shape `(d_in, d_out)`, and how many there are of each.
fn linears(files: &ModelFiles) -> Vec<(Part, (usize, usize), usize)> {
    let mut found: Vec<(Part, (usize, usize), usize)> = Vec::new();
    for entry in files.sites().entries() {
        let Some(shape) = files.sites().linear(entry.site) else { continue };
        match found.iter_mut().find(|(part, s, _)| (*part, *s) == (entry.site.part, shape)) {
            Some((_, _, count)) => *count += 1,
            None => found.push((entry.site.part, shape, 1)),
        }
    }
    found
}
