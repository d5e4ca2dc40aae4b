//! What the kernels reach on this machine, next to what its memory gives: `cargo bench -p butterfly-kernels`.

use std::hint::black_box;
use std::time::Instant;

use butterfly_kernels::{Dtype, KvCache, Matrix, Path, Pool, WeightView, attention, linear, math, silu_mul};

/// A layer of a 0.9 B-parameter model, eight times over: 180 MB of f16, more than any cache here.
const INPUTS: usize = 2048;
const OUTPUTS: usize = 8 * 5632;

fn main() {
    // `cargo test --benches` runs this file too, without the flag that `cargo bench` gives.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let path = Path::detect().unwrap_or(Path::Scalar);
    println!("path {}", path.name());
    let bytes: Vec<u8> =
        (0..INPUTS * OUTPUTS).flat_map(|i| half::f16::from_f32((i % 997) as f32 * 1e-3 - 0.5).to_le_bytes()).collect();
    let matrix = Matrix::pack(WeightView { dtype: Dtype::F16, bytes: &bytes, rows: OUTPUTS, columns: INPUTS })
        .unwrap_or_else(|error| unreachable!("{error}"));
    drop(bytes);
    for threads in [1, 2] {
        let pool = Pool::new(threads, path);
        println!("threads {threads}");
        plain_read(threads);
        for rows in [1, 2, 4, 6, 8, 12, 16, 24] {
            let seconds = time_linear(&pool, &matrix, rows);
            report(&format!("linear, {rows} rows"), matrix.bytes() as f64 / seconds / 1e9, "GB/s of weights");
        }
        for rows in [32, 96, 192] {
            let seconds = time_linear(&pool, &matrix, rows);
            let flops = 2.0 * (rows * INPUTS * OUTPUTS) as f64;
            report(&format!("linear, {rows} rows"), flops / seconds / 1e9, "GFLOP/s");
        }
        small_linear(&pool);
        decode_attention(&pool);
        elementwise(&pool);
    }
}

fn report(what: &str, figure: f64, unit: &str) {
    println!("  {what:<40} {figure:>9.2} {unit}");
}

/// The shortest of several runs, in seconds: the machine's other work only adds.
fn shortest(runs: usize, mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn time_linear(pool: &Pool, matrix: &Matrix, rows: usize) -> f64 {
    let x = vec![0.25; rows * matrix.columns()];
    let mut y = vec![0.0; rows * matrix.rows()];
    shortest(if rows > 24 { 2 } else { 5 }, || {
        linear(pool, matrix, None, black_box(&x), &mut y);
        black_box(&y);
    })
}

fn plain_read(threads: usize) {
    let words = vec![1u64; 32 << 20];
    let seconds = shortest(5, || {
        std::thread::scope(|scope| {
            for part in words.chunks(words.len() / threads) {
                scope.spawn(|| black_box(part.iter().fold(0, |all, word| all | word)));
            }
        });
    });
    report("plain reading", size_of_val(words.as_slice()) as f64 / seconds / 1e9, "GB/s");
}

/// The layers of the built-in model, which stay in the cache.
fn small_linear(pool: &Pool) {
    for (inputs, outputs) in [(192, 192), (192, 1024), (192, 2048)] {
        let bytes = vec![0; inputs * outputs * 2];
        let matrix = Matrix::pack(WeightView { dtype: Dtype::F16, bytes: &bytes, rows: outputs, columns: inputs })
            .unwrap_or_else(|error| unreachable!("{error}"));
        let x = vec![0.25; inputs];
        let mut y = vec![0.0; outputs];
        let seconds = shortest(20, || {
            for _ in 0..100 {
                linear(pool, &matrix, None, black_box(&x), &mut y);
            }
        });
        report(&format!("linear, 1 row, {inputs} to {outputs}"), seconds / 100.0 * 1e6, "us");
    }
}

fn decode_attention(pool: &Pool) {
    let (heads, kv_heads, head_dim, positions) = (32, 8, 64, 2048);
    let mut cache = KvCache::new(kv_heads, head_dim, positions);
    let row = vec![0.5; kv_heads * head_dim];
    for _ in 0..positions {
        cache.push(&row, &row).unwrap_or_else(|error| unreachable!("{error}"));
    }
    for rows in [1, 64] {
        let q = vec![0.25; rows * heads * head_dim];
        let mut out = q.clone();
        let seconds = shortest(10, || {
            attention(pool, black_box(&q), &cache, positions - rows, heads, &mut out);
        });
        let flops = 4.0 * (rows * heads * head_dim * positions) as f64;
        report(&format!("attention, {rows} rows, {positions} positions"), flops / seconds / 1e9, "GFLOP/s");
        report("", seconds * 1e6, "us");
    }
}

fn elementwise(pool: &Pool) {
    let gate = vec![0.7; 1 << 16];
    let mut out = gate.clone();
    let seconds = shortest(20, || silu_mul(pool, black_box(&gate), &gate, &mut out));
    report("silu_mul", seconds / gate.len() as f64 * 1e9, "ns");
    let seconds = shortest(20, || math::tanh_all(pool.path(), black_box(&mut out)));
    report("tanh", seconds / gate.len() as f64 * 1e9, "ns");
}
