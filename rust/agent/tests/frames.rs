//! The frame format: golden bytes, the fuzz corpus, and what must hold for any stream.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use diapause_agent::frame::{
    decode_all, encode, kind, Header, FRAME_MAX, HEADER_LEN, MAGIC, PAYLOAD_MAX,
};
use proptest::prelude::*;

fn directory(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The frames behind the golden file, in its order; the host's tests hold the same list.
fn golden() -> Vec<(Header, Vec<u8>)> {
    let header = |kind, flags, session, seq, ack| Header {
        kind,
        flags,
        session,
        seq,
        ack,
    };
    vec![
        (header(kind::ACK, 0, 0, 0, 7), vec![]),
        (header(kind::STDIN, 0, 3, 1, 0), b"hello".to_vec()),
        (
            header(kind::EXEC, 1, u32::MAX, 1 << 40, u64::MAX),
            vec![b'{'; 300],
        ),
        (header(kind::STDOUT, 0, 1, 2, 3), vec![0xA5; PAYLOAD_MAX]),
    ]
}

fn collect(stream: &[u8], piece: usize) -> (Vec<(Header, Vec<u8>, bool)>, usize) {
    let (mut frames, mut breaks) = (Vec::new(), 0);
    decode_all(stream, piece, |event| match event {
        Some((header, payload, opens)) => frames.push((header, payload.to_vec(), opens)),
        None => breaks += 1,
    });
    (frames, breaks)
}

#[test]
fn golden_frames_stay_as_they_are() {
    let stream: Vec<u8> = golden()
        .iter()
        .flat_map(|(header, payload)| encode(header, payload))
        .collect();
    let file = directory("tests/golden/frames-v1.bin");
    if std::env::var_os("DIAPAUSE_WRITE_GOLDEN").is_some() {
        fs::write(&file, &stream).unwrap();
    }
    assert_eq!(fs::read(&file).unwrap(), stream);
    let (frames, breaks) = collect(&stream, 4096);
    assert_eq!(breaks, 0);
    let expected: Vec<_> = golden()
        .into_iter()
        .map(|(header, payload)| (header, payload, false))
        .collect();
    assert_eq!(frames, expected);
}

#[test]
fn the_corpus_breaks_nothing() {
    let mut count = 0;
    for entry in fs::read_dir(directory("fuzz/corpus/frames")).unwrap() {
        let input = fs::read(entry.unwrap().path()).unwrap();
        let Some((piece, stream)) = input.split_first() else {
            continue;
        };
        decode_all(stream, usize::from(*piece) * 16 + 1, |_| ());
        count += 1;
    }
    assert!(count >= 5);
}

#[test]
fn a_greeting_is_heard_behind_any_half_frame() {
    let hello = encode(
        &Header {
            kind: kind::HELLO,
            ..Header::default()
        },
        b"{}",
    );
    let whole = encode(
        &Header {
            kind: kind::STDIN,
            session: 1,
            seq: 1,
            ..Header::default()
        },
        &[7; PAYLOAD_MAX],
    );
    for cut in (0..HEADER_LEN + 2).chain([whole.len() / 2, whole.len() - 1, whole.len()]) {
        let mut stream = whole[..cut].to_vec();
        stream.extend_from_slice(&vec![0; FRAME_MAX]);
        stream.extend_from_slice(&hello);
        let (frames, _) = collect(&stream, 4096);
        let last = frames.last().expect("the greeting");
        assert_eq!((last.0.kind, last.2), (kind::HELLO, true), "cut at {cut}");
    }
}

#[test]
fn a_greeting_inside_data_is_not_heard() {
    let hello = encode(
        &Header {
            kind: kind::HELLO,
            ..Header::default()
        },
        b"{}",
    );
    let mut payload = vec![0; PAYLOAD_MAX];
    let at = payload.len() - hello.len();
    payload[at..].copy_from_slice(&hello);
    let whole = encode(
        &Header {
            kind: kind::STDIN,
            seq: 1,
            ..Header::default()
        },
        &payload,
    );
    // An agent that begins to read anywhere in the frame, as one does that was started anew.
    for begin in 0..=HEADER_LEN {
        let (frames, _) = collect(&whole[begin..], 4096);
        assert!(
            frames.iter().all(|(_, _, opens)| !opens),
            "read from {begin}"
        );
    }
}

#[test]
fn a_length_out_of_bounds_is_no_frame() {
    let mut frame = encode(
        &Header {
            kind: kind::STDIN,
            seq: 1,
            ..Header::default()
        },
        b"x",
    );
    frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let (frames, breaks) = collect(&frame, 4096);
    assert!(frames.is_empty());
    assert!(breaks > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_stream_is_survived(
        stream in prop::collection::vec(
            prop_oneof![Just(0u8), Just(MAGIC[0]), any::<u8>()],
            0..1024,
        ),
        piece in 1usize..512,
    ) {
        decode_all(&stream, piece, |_| ());
    }

    #[test]
    fn frames_come_whole_in_any_pieces(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 0..20),
        piece in 1usize..4096,
    ) {
        let mut stream = Vec::new();
        for (index, payload) in payloads.iter().enumerate() {
            let header = Header { kind: kind::STDOUT, seq: index as u64 + 1, ..Header::default() };
            stream.extend(encode(&header, payload));
        }
        let (frames, breaks) = collect(&stream, piece);
        prop_assert_eq!(breaks, 0);
        let got: Vec<_> = frames.into_iter().map(|(_, payload, _)| payload).collect();
        prop_assert_eq!(got, payloads);
    }

    #[test]
    fn a_flipped_bit_never_passes(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let header = Header { kind: kind::STDIN, seq: 1, ..Header::default() };
        let mut frame = encode(&header, &payload);
        let index = at.index(frame.len());
        frame[index] ^= 1 << bit;
        let (frames, _) = collect(&frame, 4096);
        prop_assert!(frames.is_empty());
    }
}
