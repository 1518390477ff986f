//! The commands of the guides do what the guides say.

use std::path::Path;

use crate::run;

/// The fenced blocks of a page: language, the name in backticks on the line before, if any, and the lines.
fn blocks(page: &str) -> Vec<(String, Option<String>, String)> {
    let mut blocks: Vec<(String, Option<String>, String)> = Vec::new();
    let (mut before, mut inside) = ("", false);
    for line in page.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(_), true) => inside = false,
            (Some(language), false) => {
                let name = before.strip_prefix('`').and_then(|b| b.strip_suffix("`:"));
                blocks.push((language.into(), name.map(String::from), String::new()));
                inside = true;
            }
            (None, true) => blocks.last_mut().unwrap().2 += &format!("{line}\n"),
            (None, false) if !line.trim().is_empty() => before = line,
            (None, false) => {}
        }
    }
    blocks
}

#[test]
fn the_commands_of_evaluate_run() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/evaluate.md");
    let blocks = blocks(&std::fs::read_to_string(page).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let text = firebrick_train::domain("glosses").unwrap().held_out_text();
    std::fs::write(dir.path().join("held-out.txt"), &text[..8 * 1024]).unwrap();
    let mut ran = 0;
    for (language, name, body) in blocks {
        if let Some(name) = name {
            std::fs::write(dir.path().join(name), &body).unwrap();
        }
        for command in body.lines().filter(|_| language == "sh") {
            let arguments: Vec<&str> = command.split_whitespace().collect();
            assert_eq!(arguments[0], "firebrick", "{command}");
            let output = run(dir.path(), &[&arguments[1..], &["--device", "flex"]].concat());
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command}: {stderr}");
            println!("$ {command}\n{}", String::from_utf8_lossy(&output.stdout));
            ran += 1;
        }
    }
    assert_eq!(ran, 7, "the page lost or gained a command");
    let answers = std::fs::read_to_string(dir.path().join("answers.jsonl")).unwrap();
    assert_eq!(answers.lines().count(), 3);
}
