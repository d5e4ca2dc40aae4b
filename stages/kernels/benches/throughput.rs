//! What the kernels reach on this machine, next to what its memory gives:
//! `cargo bench -p butterfly-kernels --bench throughput [-- Q8_0 F16 ...]`.

use std::hint::black_box;
use std::time::Instant;

use butterfly_kernels::{Dtype, KvCache, Matrix, Path, Pool, WeightView, attention, linear, math, silu_mul};

/// The gate or up projection of a layer of a 0.9 B-parameter model, eight times over: 92 million weights, more than any
/// cache here.
const INPUTS: usize = 2048;
const OUTPUTS: usize = 8 * 5632;

/// Rows of a batch: decoding one sequence and eight, and a prompt.
const ROWS: [usize; 3] = [1, 8, 512];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` runs this file too, without the flag that `cargo bench` gives.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let path = Path::detect().unwrap_or(Path::Scalar);
    println!("path {}; the shortest of several runs", path.name());
    let all = arguments.iter().all(|argument| argument.starts_with("--"));
    for dtype in Dtype::ALL {
        let name = format!("{dtype:?}");
        if all || arguments.contains(&name) {
            linear_layers(path, dtype);
        }
    }
    if !all {
        return;
    }
    for threads in [1, 2] {
        println!("threads {threads}");
        let pool = Pool::new(threads, path);
        small_linear(&pool);
        decode_attention(&pool);
        elementwise(&pool);
    }
}

/// What a matrix too large for the caches reaches, beside plain reading in the same minute.
fn linear_layers(path: Path, dtype: Dtype) {
    let matrix = matrix(dtype, OUTPUTS, INPUTS);
    for threads in [1, 2] {
        let pool = Pool::new(threads, path);
        let read = plain_read(threads);
        for rows in ROWS {
            let outputs = if rows > 32 { OUTPUTS / 8 } else { OUTPUTS };
            let small;
            let used = if outputs == OUTPUTS {
                &matrix
            } else {
                small = self::matrix(dtype, outputs, INPUTS);
                &small
            };
            let seconds = time_linear(&pool, used, rows);
            let bytes = used.bytes() as f64 / seconds / 1e9;
            let products = (rows * INPUTS * outputs) as f64 / seconds / 1e9;
            println!(
                "{:<5} threads {threads}, {rows:>3} rows: {bytes:>6.2} GB/s of weights ({:>3.0} % of reading, {read:.1}), {products:>6.1} GMAC/s",
                format!("{dtype:?}"),
                100.0 * bytes / read,
            );
        }
    }
}

/// Weights of varied bytes: small numbers, or quants with small scales.
fn matrix(dtype: Dtype, rows: usize, columns: usize) -> Matrix {
    let number = |i: usize| (i % 997) as f32 * 1e-3 - 0.5;
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => (0..rows * columns).flat_map(|i| number(i).to_le_bytes()).collect(),
        Dtype::F16 => (0..rows * columns).flat_map(|i| half::f16::from_f32(number(i)).to_le_bytes()).collect(),
        Dtype::Bf16 => (0..rows * columns).flat_map(|i| half::bf16::from_f32(number(i)).to_le_bytes()).collect(),
        // As an f16, 0x1f1f is 0.007.
        _ => {
            let len = dtype.row_bytes(columns).unwrap_or(0) * rows;
            (0..len)
                .map(|i| {
                    if i % dtype.block_bytes() < 4 || i % dtype.block_bytes() >= 208 {
                        0x1f
                    } else {
                        (i * 37 % 251) as u8
                    }
                })
                .collect()
        }
    };
    Matrix::pack(WeightView { dtype, bytes: &bytes, rows, columns }).unwrap_or_else(|error| unreachable!("{error}"))
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
    let x: Vec<f32> = (0..rows * matrix.columns()).map(|i| (i % 89) as f32 * 0.01 - 0.4).collect();
    let mut y = vec![0.0; rows * matrix.rows()];
    shortest(if rows > 32 { 3 } else { 8 }, || {
        linear(pool, matrix, None, black_box(&x), &mut y);
        black_box(&y);
    })
}

/// GB/s of adding up memory, each thread in four streams: one stream alone gets less of the memory.
fn plain_read(threads: usize) -> f64 {
    let words = vec![1u64; 32 << 20];
    let read = |part: &[u64]| {
        let quarter = part.len() / 4;
        let streams: [&[[u64; 8]]; 4] = std::array::from_fn(|i| part[i * quarter..][..quarter].as_chunks().0);
        let mut all = [[0; 8]; 4];
        for line in 0..quarter / 8 {
            for (all, stream) in all.iter_mut().zip(streams) {
                for (all, word) in all.iter_mut().zip(&stream[line]) {
                    *all |= word;
                }
            }
        }
        black_box(all)
    };
    let seconds = shortest(8, || {
        let (own, others) = words.split_at(words.len() / threads);
        std::thread::scope(|scope| {
            for part in others.chunks(own.len()) {
                scope.spawn(|| read(part));
            }
            read(own);
        });
    });
    size_of_val(words.as_slice()) as f64 / seconds / 1e9
}

/// The layers of the built-in model, which stay in the cache.
fn small_linear(pool: &Pool) {
    for (inputs, outputs) in [(192, 192), (192, 1024), (192, 2048)] {
        let matrix = matrix(Dtype::F16, outputs, inputs);
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
