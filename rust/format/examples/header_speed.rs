//! Times a header of 1 M extents: geometric runs and gaps of mean 2 pages over 64 builds.
//!
//! `cargo run --release -p diapause-format --example header_speed [EXTENTS]` prints JSON lines.

use std::time::Instant;

use diapause_format::{
    overwrite, BuildKind, BuildRef, Extent, HeaderIndex, HeaderReader, HeaderWriter, Target,
    NEW_BUILD,
};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Geometric of mean 2, at least 1.
    fn run(&mut self) -> u64 {
        1 + u64::from(self.next().trailing_ones())
    }
}

fn extents(count: usize) -> Vec<Extent> {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut positions = [0u64; 65];
    let mut page = 0;
    (0..count)
        .map(|at| {
            let length = random.run();
            let build = if at % 2 == 0 {
                1 + (random.next() % 64) as usize
            } else {
                0
            };
            let target = Target {
                build: build as u32,
                position: positions[build],
            };
            if build != 0 {
                positions[build] += length + random.next() % 3;
            }
            page += length;
            Extent {
                page: page - length,
                length,
                target,
            }
        })
        .collect()
}

fn build(number: u32) -> BuildRef {
    let id = *blake3::hash(&number.to_le_bytes()).as_bytes();
    BuildRef {
        id,
        pages: 1 << 31,
        kind: BuildKind::Packed,
    }
}

fn encode(extents: &[Extent]) -> Vec<u8> {
    let pages = extents.last().map_or(0, Extent::end);
    let mut writer = HeaderWriter::new(Vec::new(), pages).expect("pages fit");
    for extent in extents {
        writer.push(*extent, build).expect("extents are in order");
    }
    writer.finish().expect("extents cover the device").1
}

fn decode(bytes: &[u8]) -> HeaderIndex {
    let reader = HeaderReader::new(bytes, None).expect("a header");
    HeaderIndex::load(reader).expect("a whole header")
}

fn provisional(bytes: &[u8], over: &[Extent]) -> Vec<u8> {
    let mut parent = HeaderReader::new(bytes, None).expect("a header");
    let mut writer = HeaderWriter::new(Vec::new(), parent.page_count()).expect("pages fit");
    let over = over.iter().map(|extent| Ok(*extent));
    overwrite(&mut parent, over, build(NEW_BUILD), &mut writer).expect("it composes");
    writer.finish().expect("it covers the device").1
}

fn best_ms<T>(mut work: impl FnMut() -> T) -> f64 {
    let times = (0..7).map(|_| {
        let begin = Instant::now();
        std::hint::black_box(work());
        begin.elapsed().as_secs_f64() * 1e3
    });
    times.fold(f64::MAX, f64::min)
}

fn main() {
    let count = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(1_000_000);
    let extents = extents(count);
    let bytes = encode(&extents);
    let pages = extents.last().map_or(0, Extent::end);
    let over: Vec<Extent> = (0..512)
        .map(|at| Extent {
            page: at * (pages / 512),
            length: 1,
            target: Target {
                build: NEW_BUILD,
                position: at,
            },
        })
        .collect();
    let index = decode(&bytes);
    let mut random = Random(7);
    let lookups = best_ms(|| {
        let found = (0..1_000_000).filter_map(|_| index.lookup(random.next() % pages));
        found.map(|target| target.position).sum::<u64>()
    });
    println!(
        "{{\"extents\": {count}, \"bytes\": {}, \"encode_ms\": {:.2}, \"decode_ms\": {:.2}, \
         \"provisional_ms\": {:.2}, \"lookup_ns\": {:.0}}}",
        bytes.len(),
        best_ms(|| encode(&extents)),
        best_ms(|| decode(&bytes)),
        best_ms(|| provisional(&bytes, &over)),
        lookups,
    );
}
