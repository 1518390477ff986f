//! What Rust source may not contain.

use super::{File, Tree, Violation, code};

/// A library is handed its device.
pub fn default_device(tree: &Tree) -> Vec<Violation> {
    let libraries =
        tree.rust().filter(|f| f.inside().starts_with("src/") && f.crate_name().is_some_and(|c| c != "cli"));
    find(
        libraries,
        false,
        &["Device::default", "<Device as Default>"],
        "a library takes a `&Device`, it picks none",
    )
}

/// A library is handed its settings. Tests, build scripts, the binary, xtask and the benches may look.
pub fn environment(tree: &Tree) -> Vec<Violation> {
    let is_library = |f: &&File| {
        let inside = f.inside();
        f.crate_name().is_some_and(|c| c != "cli") && !inside.starts_with("tests/") && inside != "build.rs"
    };
    let names = ["env::var", "env::vars", "env::var_os", "env::vars_os", "env::set_var", "env::remove_var"];
    find(tree.rust().filter(is_library), false, &names, "a library reads no environment variable")
}

/// Nothing is left for later.
pub fn unfinished(tree: &Tree) -> Vec<Violation> {
    find(tree.rust(), true, &["todo!", "unimplemented!"], "unfinished code")
}

/// `unsafe` is forbidden outside firebrick-tensor, and explained inside it.
pub fn unsafe_code(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in tree.rust() {
        if file.crate_name() == Some("tensor") {
            violations.extend(unexplained(file));
            continue;
        }
        let code = file.code.as_deref().unwrap_or_default();
        if is_crate_root(file) && !code.contains("#![forbid(unsafe_code)]") {
            violations.push(file.at(1, "`#![forbid(unsafe_code)]` is missing at the top"));
        }
        for (line, text) in file.code_lines(true) {
            if code::has_word(text, "unsafe") {
                violations.push(file.at(line, "unsafe code belongs in firebrick-tensor"));
            }
        }
    }
    violations
}

fn is_crate_root(file: &File) -> bool {
    let inside = file.inside().trim_start_matches("xtask/").trim_start_matches("benches/");
    ["src/lib.rs", "src/main.rs"].contains(&inside) || inside.starts_with("src/bin/")
}

/// Uses of `unsafe` without a SAFETY comment. Comments and attributes directly above count as one place with the
/// line itself; up to three lines of code may lie between.
fn unexplained(file: &File) -> Vec<Violation> {
    let raw: Vec<&str> = file.text.as_deref().unwrap_or_default().lines().collect();
    let explains = |line: &str| line.contains("SAFETY") || line.contains("# Safety");
    let mut violations = Vec::new();
    for (line, text) in file.code_lines(true) {
        // A pointer type, not a promise: `unsafe fn(..)`.
        let is_use = code::words(text, "unsafe").any(|at| {
            let rest = text[at + "unsafe".len()..].trim_start();
            !rest.strip_prefix("fn").is_some_and(|after| after.trim_start().starts_with('('))
        });
        if !is_use || explains(raw[line - 1]) {
            continue;
        }
        let mut code_lines = 0;
        let explained = raw[..line - 1].iter().rev().take_while(|above| {
            let above = above.trim_start();
            if !above.starts_with("//") && !above.starts_with("#[") {
                code_lines += 1;
            }
            code_lines <= 3
        });
        if !explained.into_iter().any(|above| explains(above)) {
            violations.push(file.at(line, "`unsafe` without a SAFETY comment above it"));
        }
    }
    violations
}

fn find<'a>(files: impl Iterator<Item = &'a File>, tests: bool, names: &[&str], why: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in files {
        for (line, text) in file.code_lines(tests) {
            let found = names.iter().filter(|name| match name.strip_suffix('!') {
                Some(macro_name) => code::words(text, macro_name).any(|at| text[at..].starts_with(**name)),
                None if name.starts_with('<') => text.contains(**name),
                None => code::has_word(text, name),
            });
            violations.extend(found.map(|name| file.at(line, format!("`{name}`: {why}"))));
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(rule: fn(&Tree) -> Vec<Violation>, files: &[(&str, &str)]) -> Vec<(String, usize)> {
        rule(&Tree::of(files)).into_iter().map(|v| (v.path, v.line)).collect()
    }

    #[test]
    fn libraries_pick_no_device() {
        let text = "fn f() {\n    let d = Device::default();\n}\n#[cfg(test)]\nmod tests {\n    // Device::default();\n    \
                    fn g() { Device::default(); }\n}\n";
        let files = [
            ("crates/firebrick-moe/src/lib.rs", text),
            ("crates/firebrick-moe/tests/it/main.rs", text),
            ("crates/firebrick-cli/src/main.rs", text),
        ];
        assert_eq!(found(default_device, &files), [("crates/firebrick-moe/src/lib.rs".to_owned(), 2)]);
    }

    #[test]
    fn libraries_read_no_environment() {
        let text = "// std::env::var\nlet a = std::env::var(\"X\");\nlet t = std::env::temp_dir();\nuse std::env::var_os;\n";
        let files = [
            ("crates/firebrick-moe/src/a.rs", text),
            ("crates/firebrick-moe/tests/it/main.rs", text),
            ("xtask/src/main.rs", text),
            ("benches/src/lib.rs", text),
        ];
        let path = "crates/firebrick-moe/src/a.rs".to_owned();
        assert_eq!(found(environment, &files), [(path.clone(), 2), (path, 4)]);
    }

    #[test]
    fn nothing_is_unfinished() {
        let text = "fn f() { todo!() }\nfn g() { not_todo!() }\nfn h() { \"todo!()\" }\nfn i() { unimplemented!(\"x\") }\n";
        let lines: Vec<_> =
            found(unfinished, &[("benches/src/a.rs", text)]).into_iter().map(|(_, line)| line).collect();
        assert_eq!(lines, [1, 4]);
    }

    #[test]
    fn unsafe_is_forbidden_at_every_root_but_one() {
        let files = [
            ("crates/firebrick-core/src/lib.rs", "//! Docs.\n"),
            ("crates/firebrick-core/src/other.rs", "unsafe { f() }\n"),
            ("crates/firebrick-cli/src/main.rs", "//! Docs.\n#![forbid(unsafe_code)]\n"),
            ("crates/firebrick-tensor/src/lib.rs", "//! Docs.\n"),
            ("xtask/src/main.rs", "// #![forbid(unsafe_code)]\n"),
        ];
        let want =
            ["crates/firebrick-core/src/lib.rs", "crates/firebrick-core/src/other.rs", "xtask/src/main.rs"];
        assert_eq!(found(unsafe_code, &files), want.map(|path| (path.to_owned(), 1)));
    }

    #[test]
    fn unsafe_needs_a_reason_close_above() {
        let text = "// SAFETY: checked.\nunsafe { a() }\n\nfn b() {}\n\nfn c() {\n    unsafe { a() }\n}\n\
                    type F = unsafe fn(u8);\n/// # Safety\n///\n/// One.\n/// Two.\n/// Three.\n#[inline]\n\
                    pub unsafe fn d() {}\nlet x = unsafe { e() }; // SAFETY: here.\n";
        let file = "crates/firebrick-tensor/src/a.rs";
        assert_eq!(found(unsafe_code, &[(file, text)]), [(file.to_owned(), 7)]);
    }
}
