//! `firebrick devices`.

use anyhow::Result;
use clap::Args;
use firebrick_core::list_devices;
use serde_json::json;

use crate::args::Global;
use crate::ui::Terminal;

#[derive(Args)]
pub struct Devices {}

impl Devices {
    pub fn run(&self, _global: &Global, terminal: &Terminal) -> Result<()> {
        let devices = list_devices();
        let rows: Vec<_> = devices
            .iter()
            .map(|d| json!({"device": d.spec.to_string(), "name": d.name, "kind": d.kind, "software": d.software}))
            .collect();
        terminal.result(&rows, || {
            let line = |d: &firebrick_core::DeviceInfo| {
                let software = if d.software { " (software, slow)" } else { "" };
                format!("{:10} {} {}{software}\n", d.spec.to_string(), d.kind, d.name)
            };
            devices.iter().map(line).collect()
        })
    }
}
