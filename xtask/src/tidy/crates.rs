//! Which crate may depend on which.

use super::{Tree, Violation, code, numbered};

/// Each crate of the spine may use those before it; every method crate may use the whole spine.
const SPINE: &[&str] = &["core", "tensor", "models", "train"];

/// Method crates, and what each may use besides the spine.
const METHODS: &[(&str, &[&str])] = &[
    ("analysis", &[]),
    ("moe", &[]),
    ("peft", &["moe"]),
    ("merge", &["analysis", "moe", "peft"]),
    ("quant", &["analysis"]),
    ("distill", &["peft"]),
    ("elastic", &["analysis", "peft"]),
];

/// Crates of burn that are not its public interface.
const INTERNALS: &[&str] = &[
    "burn-autodiff",
    "burn-backend",
    "burn-cubecl",
    "burn-cuda",
    "burn-flex",
    "burn-fusion",
    "burn-wgpu",
    "cubecl",
];

/// A dependency as a manifest names it.
#[derive(Debug, PartialEq, Eq)]
struct Dependency {
    line: usize,
    name: String,
    dev: bool,
}

/// `core <- tensor <- models <- train <- methods <- cli`, never reversed.
pub fn dependency_direction(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in tree.files.iter().filter(|file| file.path.ends_with("/Cargo.toml")) {
        let text = file.text.as_deref().unwrap_or_default();
        let user = match (file.crate_name(), file.path.as_str()) {
            (Some(name), _) => name,
            (None, "benches/Cargo.toml") => "benches",
            (None, "xtask/Cargo.toml") => "xtask",
            _ => continue,
        };
        if let Some(name) = file.crate_name()
            && !known(name)
        {
            violations.push(file.at(
                1,
                format!("firebrick-{name} has no place in the order of crates (xtask/src/tidy/crates.rs)"),
            ));
            continue;
        }
        for dependency in dependencies(text) {
            let Some(used) = dependency.name.strip_prefix("firebrick-") else { continue };
            if !may_use(user, used, dependency.dev) {
                let message = format!("{user} may not depend on firebrick-{used}: the order of crates");
                violations.push(file.at(dependency.line, message));
            }
        }
    }
    violations
}

/// Only firebrick-tensor names burn's internal crates.
pub fn burn_internals(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    let outside = |path: &str| {
        path.starts_with("crates/") || path.starts_with("benches/") || path.starts_with("xtask/")
    };
    for file in tree.files.iter().filter(|file| outside(&file.path) && file.crate_name() != Some("tensor")) {
        if file.path.ends_with("/Cargo.toml") {
            for dependency in dependencies(file.text.as_deref().unwrap_or_default()) {
                let name = &dependency.name;
                if INTERNALS.contains(&name.as_str()) || name.starts_with("cubecl-") {
                    violations.push(
                        file.at(dependency.line, format!("only firebrick-tensor may depend on {name}")),
                    );
                }
            }
        }
        for (line, text) in file.code_lines(true) {
            for internal in INTERNALS {
                let name = internal.replace('-', "_");
                // `burn::cubecl` is burn's public door to device discovery.
                if code::words(text, &name).any(|at| !text[..at].ends_with("burn::")) {
                    violations.push(file.at(line, format!("only firebrick-tensor may name {name}")));
                }
            }
        }
    }
    violations
}

fn known(name: &str) -> bool {
    SPINE.contains(&name) || METHODS.iter().any(|(method, _)| *method == name) || name == "cli"
}

fn may_use(user: &str, used: &str, dev: bool) -> bool {
    let method = |name: &str| METHODS.iter().find(|(method, _)| *method == name);
    let place = |name: &str| SPINE.iter().position(|crate_| *crate_ == name);
    if ["cli", "benches"].contains(&user) {
        return place(used).is_some() || method(used).is_some();
    }
    match (place(user), method(user), place(used)) {
        (Some(user), _, Some(used)) => used < user,
        (None, Some(_), Some(_)) => true,
        // The tests of a method may compare it with any other.
        (None, Some((_, uses)), None) => uses.contains(&used) || (dev && method(used).is_some()),
        _ => false,
    }
}

/// The dependencies in a manifest of the plain layout that this workspace keeps to.
fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut found = Vec::new();
    let mut inside = None;
    for (line, text) in numbered(manifest) {
        let text = text.split('#').next().unwrap_or_default().trim();
        if let Some(section) = text.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            let dev = section.contains("dev-dependencies");
            inside = section.ends_with("dependencies").then_some(dev);
            // `[dependencies.NAME]`
            if let Some((table, name)) = section.rsplit_once('.')
                && table.ends_with("dependencies")
            {
                found.push(Dependency { line, name: name.trim_matches('"').to_owned(), dev });
            }
        } else if let (Some(dev), Some((key, value))) = (inside, text.split_once('=')) {
            let renamed = value.split_once("package").and_then(|(_, rest)| rest.split('"').nth(1));
            let key = key.split('.').next().unwrap_or_default().trim().trim_matches('"');
            found.push(Dependency { line, name: renamed.unwrap_or(key).to_owned(), dev });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(violations: &[Violation]) -> Vec<usize> {
        violations.iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn manifests_are_read_with_renames_targets_and_tables() {
        let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true # c = 1\nb = { package = \"c\" }\n\
                        [target.'cfg(unix)'.dependencies]\nd = \"1\"\n[dev-dependencies.e]\nversion = \"1\"\n\
                        [features]\nf = []\n";
        let names: Vec<_> = dependencies(manifest).into_iter().map(|d| (d.line, d.name, d.dev)).collect();
        let want = [(4, "a", false), (5, "c", false), (7, "d", false), (8, "e", true)];
        assert_eq!(names, want.map(|(line, name, dev)| (line, name.to_owned(), dev)));
    }

    #[test]
    fn dependencies_point_down() {
        let quant = "[dependencies]\nfirebrick-train.workspace = true\nfirebrick-analysis.workspace = true\n\
                     firebrick-moe.workspace = true\n[dev-dependencies]\nfirebrick-peft.workspace = true\n\
                     firebrick-cli.workspace = true\n";
        let core = "[dependencies]\nburn.workspace = true\nfirebrick-tensor.workspace = true\n";
        let tree = Tree::of(&[
            ("crates/firebrick-quant/Cargo.toml", quant),
            ("crates/firebrick-core/Cargo.toml", core),
            ("crates/firebrick-stray/Cargo.toml", "[dependencies]\n"),
            ("xtask/Cargo.toml", "[dependencies]\nfirebrick-core.workspace = true\n"),
        ]);
        assert_eq!(lines(&dependency_direction(&tree)), [4, 7, 3, 1, 2]);
    }

    #[test]
    fn burn_internals_stay_in_tensor() {
        let source = "use burn_flex::Flex; // allowed nowhere else\nuse cubecl::prelude::*;\n// burn_flex\n\
                      let d = burn::cubecl::Device::cuda(0);\n";
        let tree = Tree::of(&[
            ("crates/firebrick-core/src/a.rs", source),
            ("crates/firebrick-tensor/src/a.rs", source),
            (
                "crates/firebrick-core/Cargo.toml",
                "[dependencies]\nburn-fusion.workspace = true\ncubecl-core = \"1\"\n",
            ),
        ]);
        assert_eq!(lines(&burn_internals(&tree)), [1, 2, 2, 3]);
    }
}
