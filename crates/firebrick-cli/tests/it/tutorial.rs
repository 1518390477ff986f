//! The tutorial of the guide, command by command.

use std::path::Path;
use std::process::Command;

use crate::json;

#[test]
fn every_command_of_the_tutorial_does_what_the_page_says() {
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/tutorial.md"))
            .unwrap();
    let commands: Vec<&str> = page
        .split("```sh\n")
        .skip(1)
        .flat_map(|block| block.split("```").next().unwrap().lines())
        .filter(|line| !line.is_empty())
        .collect();
    assert!(commands.len() > 9, "{commands:?}");
    let dir = tempfile::tempdir().unwrap();
    let binary = Path::new(env!("CARGO_BIN_EXE_firebrick")).parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    for command in &commands {
        let output =
            Command::new("sh").args(["-c", command]).current_dir(&dir).env("PATH", &path).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let perplexity = |arguments: &[&str]| {
        let data = ["--data", "held-out.txt", "--window", "128"];
        json(dir.path(), &[&["eval", "--model"], arguments, &data].concat())["perplexity"].as_f64().unwrap()
    };
    let (base, adapted) = (perplexity(&["embedded"]), perplexity(&["embedded", "--adapter", "adapter"]));
    let (merged, packed) = (perplexity(&["merged"]), perplexity(&["lamps.gguf"]));
    assert!(adapted < 0.5 * base, "{adapted} against {base}");
    assert!((merged / adapted - 1.0).abs() < 1e-3, "{merged} against {adapted}");
    assert!(packed < 1.2 * merged, "{packed} against {merged}");
    assert_ne!(packed, merged, "control: 3 bits round");
}
