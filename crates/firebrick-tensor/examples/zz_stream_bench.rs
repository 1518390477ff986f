use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, write_safetensors};
use firebrick_tensor::stream::*;
use std::time::Instant;
struct Linear<'a>(Vec<&'a Checkpoint>);
impl Transform for Linear<'_> {
    fn name(&self) -> &str { "merge linear" }
    fn sources(&self) -> Vec<Source<'_>> { self.0.iter().map(|c| Source { name: "m".into(), checkpoint: c }).collect() }
    fn outputs(&self) -> std::result::Result<Vec<OutputSpec>, StreamError> {
        Ok(self.0[0].tensors().iter().map(|t| OutputSpec::elementwise(t.spec(), (0..self.0.len()).map(|i| (i, t.name.clone())).collect())).collect())
    }
    fn settings(&self) -> serde_json::Value { serde_json::Value::Null }
    fn compute(&self, job: &mut Job<'_>) -> std::result::Result<(), StreamError> {
        job.elementwise(|_, x, out| { for x in x { for (o, x) in out.iter_mut().zip(*x) { *o += 0.3333 * x; } } })
    }
}
fn rss(key: &str) -> String { std::fs::read_to_string("/proc/self/status").unwrap().lines().find(|l| l.starts_with(key)).unwrap_or("").to_string() }
fn cpu() -> (f64, f64) { let s = std::fs::read_to_string("/proc/self/stat").unwrap(); let f: Vec<&str> = s.rsplit(')').next().unwrap().split_whitespace().collect(); (f[11].parse::<f64>().unwrap()/100.0, f[12].parse::<f64>().unwrap()/100.0) }
fn main() {
    {
        use sha2::Digest;
        let b = vec![7u8; 256 << 20];
        let c = cpu(); let h = blake3::hash(&b); let d = cpu(); println!("blake3 {:.2} cpu s/256MiB {h}", d.0 - c.0);
        let c = cpu(); let h = sha2::Sha256::digest(&b); let d = cpu(); println!("sha256 {:.2} cpu s/256MiB {:x}", d.0 - c.0, h);
    }
    let dir = std::path::PathBuf::from(std::env::args().nth(1).unwrap());
    std::fs::create_dir_all(&dir).unwrap();
    let specs: Vec<TensorSpec> = (0..16).map(|i| TensorSpec::new(format!("l.{i}"), DType::BF16, [2048, 4096])).collect();
    let mut files = vec![];
    for k in 0..3u8 {
        let p = dir.join(format!("s{k}.safetensors"));
        if !p.exists() {
            let data: Vec<(TensorSpec, Vec<u8>)> = specs.iter().map(|s| (s.clone(), (0..2048*4096*2).map(|i| if i % 2 == 0 { (i as u32).wrapping_mul(2654435761 + k as u32).to_le_bytes()[3] } else { 0x3c }).collect())).collect();
            write_safetensors(&p, &Default::default(), &data).unwrap();
        }
        files.push(Checkpoint::open(&p).unwrap());
    }
    let bytes = std::fs::metadata(files[0].path()).unwrap().len() as f64;
    for _ in 0..2 {
        let c = cpu(); let t = Instant::now(); std::fs::copy(files[0].path(), dir.join("cp")).unwrap(); let d = cpu(); println!("copy cpu u {:.2} s {:.2}", d.0-c.0, d.1-c.1);
        println!("fs::copy            {:.2} GB/s", bytes / t.elapsed().as_secs_f64() / 1e9);
        std::fs::remove_file(dir.join("cp")).unwrap();
        let t = Instant::now(); { let b = std::fs::read(files[0].path()).unwrap(); std::fs::write(dir.join("cp"), b).unwrap(); }
        println!("read + write        {:.2} GB/s", bytes / t.elapsed().as_secs_f64() / 1e9);
        let t = Instant::now(); std::fs::File::open(dir.join("cp")).unwrap().sync_all().unwrap();
        println!("fsync               {:.2} s", t.elapsed().as_secs_f64());
        std::fs::remove_file(dir.join("cp")).unwrap();
    }
    println!("{} {}", rss("VmHWM"), rss("VmRSS"));
    std::fs::write("/proc/self/clear_refs", "5").ok();
    let quants = { let mut c = Convert::copy("m", &files[0]); c.outputs.iter_mut().for_each(|(s, _)| s.dtype = DType::Q8_0); 
        let t = Target::Gguf { path: dir.join("q.gguf"), metadata: Default::default() };
        let i = Instant::now(); Executor { overwrite: true, sha256: false, ..Executor::default() }.run(&c, &t).unwrap();
        println!("quantize q8_0 {:.2} GB/s in", bytes / i.elapsed().as_secs_f64() / 1e9);
        Checkpoint::open(dir.join("q.gguf")).unwrap() };
    let copy = Convert::copy("m", &files[0]);
    let mut deq = Convert::copy("m", &quants); deq.outputs.iter_mut().for_each(|(s, _)| s.dtype = DType::BF16);
    let one = Linear(vec![&files[0]]);
    let three = Linear(files.iter().collect());
    for (name, t, reads) in [("copy", &copy as &dyn Transform, 1.0), ("linear of 1", &one, 1.0), ("linear of 3", &three, 3.0), ("dequantize", &deq, 0.53)] {
        for sha256 in [false, true] { for threads in [1, 2] { for cap in [None] {
            let e = Executor { threads: Some(threads), max_memory: cap, sha256, overwrite: true, ..Executor::default() };
            std::fs::write("/proc/self/clear_refs", "5").ok();
            let c = cpu(); let i = Instant::now();
            let r = e.run(t, &Target::folder(dir.join("out"))).unwrap();
            let s = i.elapsed().as_secs_f64(); let d = cpu(); print!("cpu u {:.2} s {:.2}  ", d.0-c.0, d.1-c.1);
            println!("{name:12} sha {sha256:5} threads {threads} cap {:>7}: {:.3} s  out {:.2} GB/s  in+out {:.2} GB/s  peak {} kB {} ", cap.unwrap_or(0), s, bytes / s / 1e9, bytes * (1.0 + reads) / s / 1e9, r.peak_memory_bytes / 1000, rss("VmHWM"));
        } } }
    }
}
