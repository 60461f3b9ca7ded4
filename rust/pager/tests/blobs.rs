//! Blobs over HTTP from a server that is slow, fails, breaks off, hangs and lies; and two media.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diapause_format::hex;
use diapause_pager::blobs::{
    Blob, BlobError, BlobSource, Directory, HttpLimits, HttpSource, Layered,
};
use diapause_pager::device::{Device, Origin};
use diapause_pager::spec::{BlobsSpec, DeviceSpec};
use nix::sys::socket;
use support::server::{Act, Server};
use support::{pages, read, Dice, Watched, World, FAR};

const SECOND: Duration = Duration::from_secs(1);

/// Bounds that a test can wait for; a machine that is busy must not run into them by itself.
fn limits() -> HttpLimits {
    HttpLimits {
        silence: 2 * SECOND,
        response: 2 * SECOND,
        request: 5 * SECOND,
        total: 8 * SECOND,
        requests: 3,
        pause: Duration::from_millis(5),
        ..HttpLimits::default()
    }
}

struct Setup {
    world: World,
    server: Server,
    source: Arc<HttpSource>,
}

impl Setup {
    fn new(page_count: u64) -> Self {
        let world = World::straight(pages(page_count, &mut Dice::new(page_count)));
        let server = Server::new(world.builds_directory());
        let source = Arc::new(HttpSource::new(&server.url(), limits()).unwrap());
        Self {
            world,
            server,
            source,
        }
    }

    fn name(&self) -> String {
        hex(&self.world.stores[0].id)
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(self.world.build_file(0)).unwrap()
    }

    fn blob(&self) -> Box<dyn Blob> {
        self.source.open(&self.name()).unwrap()
    }

    fn device(&self) -> Device {
        Device::open(
            &self.world.spec,
            self.world.builds_from(self.source.clone()),
        )
        .unwrap()
    }

    /// What reading and opening say while the server acts so.
    fn causes(&self, act: Act) -> [BlobError; 2] {
        self.server.always(Act::Serve);
        let blob = self.blob();
        self.server.always(act.clone());
        let read = blob.read_at(5000, &mut [0; 10_000]).expect_err("read");
        let read_requests = self.server.requests().len();
        let opened = self.source.open(&self.name());
        let opened = opened.map(|_| ()).expect_err("opened");
        for (error, requests) in [
            (&read, read_requests),
            (&opened, self.server.requests().len() - read_requests),
        ] {
            let passing = matches!(
                act,
                Act::Close | Act::CutAfter(_) | Act::ShorterSaid | Act::Status(503 | 500 | 429)
            );
            let expected = if passing { 3 } else { 1 };
            assert_eq!(requests, expected, "{act:?}: {error}");
        }
        [read, opened]
    }
}

fn unavailable(error: &BlobError, cause: &str) {
    let BlobError::Unavailable(found) = error else {
        panic!("{error:?} in place of {cause}");
    };
    assert!(found.contains(cause), "{found} in place of {cause}");
}

#[test]
fn any_range_of_a_blob_is_read() {
    let setup = Setup::new(300);
    let file = setup.file();
    for act in [Act::Serve, Act::Chunked] {
        setup.server.always(act);
        let blob = setup.blob();
        assert_eq!(blob.size_bytes(), file.len() as u64);
        let mut dice = Dice::new(3);
        for _ in 0..60 {
            let start = dice.below(file.len() as u64);
            let length = dice.below((file.len() as u64 - start).min(200_000) + 1);
            let mut bytes = vec![0; length as usize];
            blob.read_at(start, &mut bytes).unwrap();
            assert!(bytes == file[start as usize..(start + length) as usize]);
        }
        let mut whole = Vec::new();
        let mut stream = blob.stream(0, file.len() as u64).unwrap();
        stream.read_to_end(&mut whole).unwrap();
        assert!(whole == file);
        let beyond = blob.read_at(file.len() as u64 - 9, &mut [0; 10]);
        assert_eq!(beyond, Err(BlobError::Short));
        assert_eq!(blob.stream(u64::MAX, 2).err(), Some(BlobError::Short));
    }
    // All of it over one connection.
    assert_eq!(setup.server.connections(), 1);
}

#[test]
fn small_and_empty_blobs_have_their_size() {
    let setup = Setup::new(1);
    let directory = setup.world.builds_directory();
    for (size, act) in [(0, Act::Serve), (1, Act::Serve), (4096, Act::Serve)] {
        std::fs::write(directory.join("small"), vec![7; size]).unwrap();
        setup.server.always(act);
        let blob = setup.source.open("small").unwrap();
        assert_eq!(blob.size_bytes(), size as u64);
        let mut bytes = vec![0; size];
        blob.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, vec![7; size]);
    }
    // A server that ignores ranges does for what is within one.
    setup.server.always(Act::Whole);
    assert_eq!(setup.source.open("small").unwrap().size_bytes(), 4096);
    std::fs::write(directory.join("small"), vec![7; 4097]).unwrap();
    unavailable(&setup.source.open("small").unwrap_err(), "ignores ranges");
}

#[test]
fn a_blob_that_is_not_there_is_missing() {
    let setup = Setup::new(90);
    let blob = setup.blob();
    std::fs::remove_file(setup.world.build_file(0)).unwrap();
    let read = blob.read_at(5000, &mut [0; 9]);
    assert_eq!(read, Err(BlobError::Missing));
    assert_eq!(setup.source.open("other").err(), Some(BlobError::Missing));
    assert_eq!(setup.open_at_status(410), BlobError::Missing);
}

impl Setup {
    fn open_at_status(&self, status: u16) -> BlobError {
        self.server.always(Act::Status(status));
        self.source.open("any").unwrap_err()
    }
}

#[test]
fn each_answer_that_is_not_the_range_is_an_error_of_its_own() {
    let setup = Setup::new(40);
    for (act, causes) in [
        (Act::Whole, ["ignores ranges"; 2]),
        (
            Act::OtherRange,
            ["with range \"bytes 5001-", "with range \"bytes 1-"],
        ),
        (Act::NoRange, ["with range \"\""; 2]),
        (Act::LongerSaid, ["more than its range"; 2]),
        (Act::LongerSent, ["more than its range"; 2]),
        (Act::ShorterSaid, ["less than its range"; 2]),
        (Act::Encoded, ["encodes"; 2]),
        (Act::Status(403), ["status 403"; 2]),
        (Act::Status(301), ["status 301"; 2]),
        (Act::Status(204), ["status 204"; 2]),
        (Act::Status(500), ["status 500"; 2]),
        (Act::Status(503), ["status 503"; 2]),
        (Act::Status(429), ["status 429"; 2]),
        (Act::Status(416), ["status 416"; 2]),
        (Act::Close, ["can't be reached"; 2]),
        (Act::CutAfter(0), ["range"; 2]),
    ] {
        let [read, opened] = match act {
            // Whether a connection ended early or broke is the system's to say.
            Act::CutAfter(_) => setup.causes(act.clone()).map(|error| match error {
                BlobError::Unavailable(_) => BlobError::Unavailable("range".into()),
                other => other,
            }),
            _ => setup.causes(act.clone()),
        };
        unavailable(&read, causes[0]);
        unavailable(&opened, causes[1]);
    }
    // Of another size than it was opened with.
    setup.server.always(Act::Serve);
    let blob = setup.blob();
    setup.server.always(Act::OtherSize);
    let size = setup.file().len() + 1;
    let error = blob.read_at(5000, &mut [0; 10]).unwrap_err();
    unavailable(&error, &format!("it has {size} bytes now"));
}

#[test]
fn garbage_and_heads_without_an_end_are_errors() {
    let setup = Setup::new(40);
    for act in [Act::Garbage, Act::EndlessHead] {
        setup.server.always(act);
        let error = setup.source.open(&setup.name()).unwrap_err();
        unavailable(&error, "can't be reached");
    }
    setup.server.always(Act::Serve);
    setup
        .world
        .check(&setup.device(), 0, setup.world.expected.len());
}

#[test]
fn what_passes_is_asked_for_again_from_where_it_broke_off() {
    let setup = Setup::new(200);
    let file = setup.file();
    let blob = setup.blob();
    let mut bytes = vec![0; 100_000];
    for passing in [Act::Status(503), Act::Close, Act::CutAfter(0)] {
        setup.server.act(move |request, _| match request {
            0 | 1 => passing.clone(),
            _ => Act::Serve,
        });
        bytes.fill(0);
        blob.read_at(9000, &mut bytes).unwrap();
        assert!(bytes == file[9000..109_000]);
        assert_eq!(setup.server.requests().len(), 3);
    }
    setup.server.act(|request, _| match request {
        0 => Act::CutAfter(70_000),
        _ => Act::Serve,
    });
    bytes.fill(0);
    blob.read_at(9000, &mut bytes).unwrap();
    assert!(bytes == file[9000..109_000]);
    let ranges: Vec<String> = setup
        .server
        .requests()
        .into_iter()
        .map(|(_, range)| range)
        .collect();
    assert_eq!(ranges[0], "bytes=9000-108999");
    // What came before the end is not asked for again; how much that is the system decides.
    let again: u64 = ranges[1]["bytes=".len()..ranges[1].len() - "-108999".len()]
        .parse()
        .unwrap();
    assert!((9000..=79_000).contains(&again), "{ranges:?}");
}

#[test]
fn a_server_that_says_nothing_costs_a_bounded_time() {
    let setup = Setup::new(60);
    let quick = HttpLimits {
        response: SECOND / 2,
        silence: SECOND / 2,
        total: SECOND * 2,
        ..limits()
    };
    let source = HttpSource::new(&setup.server.url(), quick).unwrap();
    for act in [Act::Hang, Act::HangAfter(0), Act::HangAfter(3000)] {
        setup.server.always(Act::Serve);
        let blob = source.open(&setup.name()).unwrap();
        setup.server.always(act.clone());
        let began = Instant::now();
        let error = blob.read_at(5000, &mut [0; 60_000]).unwrap_err();
        unavailable(&error, "does not answer in time");
        let took = began.elapsed();
        assert!(
            took >= quick.silence && took < 30 * SECOND,
            "{act:?}: {took:?}"
        );
    }
    // Silence alone, where every other bound is far.
    let silence = HttpLimits {
        silence: SECOND / 2,
        request: 600 * SECOND,
        total: 600 * SECOND,
        requests: 1,
        ..limits()
    };
    setup.server.always(Act::Serve);
    let source = HttpSource::new(&setup.server.url(), silence).unwrap();
    let blob = source.open(&setup.name()).unwrap();
    setup.server.always(Act::HangAfter(3000));
    let began = Instant::now();
    let error = blob.read_at(5000, &mut [0; 60_000]).unwrap_err();
    unavailable(&error, "does not answer in time");
    assert!(began.elapsed() < 60 * SECOND);
    // One that drips: each piece in time, the whole never.
    let whole = HttpLimits {
        request: SECOND,
        requests: 1,
        ..limits()
    };
    setup.server.always(Act::Serve);
    let source = HttpSource::new(&setup.server.url(), whole).unwrap();
    let blob = source.open(&setup.name()).unwrap();
    setup.server.always(Act::Drip);
    let began = Instant::now();
    let error = blob.read_at(5000, &mut [0; 60_000]).unwrap_err();
    unavailable(&error, "does not answer in time");
    assert!(began.elapsed() < 30 * SECOND);
}

#[test]
fn nobody_at_the_address_is_an_error_within_the_bound() {
    let (_held, url) = nobody();
    let source = HttpSource::new(&url, limits()).unwrap();
    unavailable(&source.open("any").unwrap_err(), "can't be reached");
    let source = HttpSource::new("http://no.such.host.invalid/", limits()).unwrap();
    let began = Instant::now();
    unavailable(&source.open("any").unwrap_err(), "the server");
    assert!(began.elapsed() < 60 * SECOND);
}

/// An address that nobody listens at, as long as the socket is held.
fn nobody() -> (OwnedFd, String) {
    let (kind, none) = (socket::SockType::Stream, socket::SockFlag::empty());
    let held = socket::socket(socket::AddressFamily::Inet, kind, none, None).unwrap();
    socket::bind(held.as_raw_fd(), &socket::SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    let address: socket::SockaddrIn = socket::getsockname(held.as_raw_fd()).unwrap();
    (held, format!("http://{address}/"))
}

#[test]
fn a_device_over_http_is_right_while_every_third_request_fails() {
    let setup = Setup::new(1500);
    setup.server.act(|request, _| match request % 9 {
        2 => Act::Status(503),
        5 => Act::CutAfter(100_000),
        8 => Act::Close,
        _ => Act::Slow(Duration::from_millis(2)),
    });
    let device = setup.device();
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (setup, device) = (&setup, &device);
            scope.spawn(move || {
                let mut dice = Dice::new(reader);
                for _ in 0..40 {
                    let offset = dice.below(setup.world.expected.len() as u64);
                    // One read of four at once may meet as many failures as it has tries.
                    check_in_the_end(setup, device, offset, dice.below(300_000) as usize);
                }
            });
        }
    });
    check_in_the_end(&setup, &device, 0, setup.world.expected.len());
}

/// What fails as often as it may in one read is right in another.
fn check_in_the_end(setup: &Setup, device: &Device, offset: u64, size: usize) {
    for _ in 0..30 {
        match read(device, offset, size) {
            Ok((bytes, _)) => return setup.world.compare(offset, size, &bytes),
            Err(error) => assert!(!error.damaged, "{error}"),
        }
    }
    setup.world.check(device, offset, size);
}

#[test]
fn a_server_that_lies_is_found_out() {
    let setup = Setup::new(64);
    setup.server.always(Act::Lie);
    let error = read(&setup.device(), 0, 10).unwrap_err();
    assert!(error.damaged, "{error}");
    // In the frames alone.
    setup.server.act(|request, _| match request {
        0 => Act::Serve,
        _ => Act::Lie,
    });
    let device = setup.device();
    let whole = read(&device, 0, setup.world.expected.len()).unwrap_err();
    assert!(whole.damaged && whole.cause.contains("frame"), "{whole}");
    setup.server.always(Act::Serve);
    setup.world.check(&device, 0, setup.world.expected.len());
}

#[test]
fn a_source_that_goes_away_is_an_error_and_comes_back() {
    let setup = Setup::new(300);
    let device = setup.device();
    setup.world.check(&device, 0, 10);
    for gone in [Act::Close, Act::Status(503), Act::Status(404)] {
        setup.server.always(gone);
        // What is kept is read all the same.
        setup.world.check(&device, 0, 10);
        let fresh = setup.device();
        let error = read(&fresh, 0, 10).unwrap_err();
        assert!(!error.damaged, "{error}");
        setup.server.always(Act::Serve);
        setup.world.check(&fresh, 0, setup.world.expected.len());
    }
}

#[test]
fn opening_takes_one_request_and_a_window_one() {
    let setup = Setup::new(2000);
    setup.server.always(Act::Slow(Duration::from_millis(20)));
    let device = setup.device();
    setup.world.check(&device, 0, 100);
    let requests = setup.server.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    let table_and_footer = 2000_usize.div_ceil(16) * 32 + 64;
    assert_eq!(requests[0].1, format!("bytes=-{table_and_footer}"));
    for offset in (0..4 << 20).step_by(128 << 10) {
        setup.world.check(&device, offset, 128 << 10);
    }
    assert_eq!(setup.server.requests().len(), 2);
}

#[test]
fn a_server_that_does_not_count_from_the_end_is_asked_from_the_start_from_then_on() {
    for act in [200, 206, 400, 416, 501].map(Act::FromStartOnly) {
        let setup = Setup::new(2000);
        setup.server.always(act.clone());
        for first in [1, 0] {
            setup.server.always(act.clone());
            let device = setup.device();
            setup.world.check(&device, 0, 100);
            let ranges: Vec<String> = setup.server.requests().into_iter().map(|r| r.1).collect();
            let expected = ["bytes=-4064", "bytes=0-4095"];
            assert_eq!(
                ranges[..=first],
                expected[1 - first..],
                "{act:?}: {ranges:?}"
            );
            assert_eq!(ranges.len(), first + 3, "{act:?}: {ranges:?}");
        }
        setup
            .world
            .check(&setup.device(), 0, setup.world.expected.len());
    }
}

#[test]
fn the_end_of_a_blob_is_all_of_a_small_one_and_never_more_than_was_asked_for() {
    let setup = Setup::new(1);
    let small = setup.world.builds_directory().join("small");
    for (size, act) in [
        (0, Act::Serve),
        (1, Act::Serve),
        (99, Act::Whole),
        (99, Act::Chunked),
    ] {
        std::fs::write(&small, vec![7; size]).unwrap();
        setup.server.always(act);
        let opened = setup.source.open_with_end("small", 99).unwrap();
        assert_eq!(
            (opened.blob.size_bytes(), opened.end),
            (size as u64, vec![7; size])
        );
    }
    std::fs::write(&small, vec![7; 300]).unwrap();
    let opened = setup.source.open_with_end("small", 99).unwrap();
    assert_eq!((opened.blob.size_bytes(), opened.end.len()), (300, 99));
    // More than that costs a request of its own.
    setup.server.always(Act::Serve);
    let opened = setup.source.open_with_end("small", 1 << 40).unwrap();
    assert_eq!((opened.blob.size_bytes(), opened.end.len()), (300, 0));
    assert_eq!(setup.server.requests()[0].1, "bytes=0-4095");
    for (act, cause) in [
        (Act::NoRange, "with range \"\""),
        (Act::LongerSaid, "more than its range"),
        (Act::LongerSent, "more than its range"),
        (Act::ShorterSaid, "less than its range"),
        (Act::Encoded, "encodes"),
        (Act::Status(403), "status 403"),
    ] {
        setup.server.always(act);
        let error = setup.source.open_with_end("small", 99).unwrap_err();
        unavailable(&error, cause);
    }
}

#[test]
fn a_build_that_lies_here_is_not_fetched() {
    let setup = Setup::new(100);
    let here = Arc::new(Directory(setup.world.builds_directory()));
    let far = Watched::new(&setup.world.builds_directory(), FAR);
    let both = Arc::new(Layered::new(here, far.clone()));
    let device = Device::open(&setup.world.spec, setup.world.builds_from(both)).unwrap();
    setup.world.check(&device, 0, setup.world.expected.len());
    assert!(far.log().opened.is_empty());
    let (_, origin) = read(&device, 50 << 10, 10).unwrap();
    assert_eq!(origin, Origin::Kept);
    let none = Arc::new(Directory("/nowhere".into()));
    let elsewhere = Arc::new(Layered::new(none, far.clone()));
    let device = Device::open(&setup.world.spec, setup.world.builds_from(elsewhere)).unwrap();
    assert_eq!(read(&device, 0, 10).unwrap().1, Origin::Remote);
    setup.world.check(&device, 0, setup.world.expected.len());
    assert_eq!(far.log().opened[&setup.name()], 1);
    // In neither: the second's word; or the first's, where that is the one that should have it.
    let missing = Layered::new(far.clone(), Arc::new(Directory("/nowhere".into())));
    assert_eq!(missing.open("none").err(), Some(BlobError::Missing));
    let (_held, url) = nobody();
    let refused = HttpSource::new(&url, limits()).unwrap();
    let away = Layered::new(Arc::new(refused), Arc::new(Directory("/nowhere".into())));
    unavailable(&away.open("none").unwrap_err(), "can't be reached");
}

#[test]
fn a_spec_says_where_builds_lie() {
    let setup = Setup::new(30);
    let parse = |json: serde_json::Value| serde_json::from_value::<BlobsSpec>(json);
    let path = setup.world.builds_directory();
    let url = setup.server.url();
    let here = serde_json::json!({"kind": "directory", "path": "/nowhere"});
    let there = serde_json::json!({"kind": "http", "url": url, "fallback": null});
    let mut both = here.clone();
    both["fallback"] = there.clone();
    let (_held, refused) = nobody();
    let mut back = serde_json::json!({"kind": "http", "url": refused});
    back["fallback"] = serde_json::json!({"kind": "directory", "path": path});
    for json in [&there, &both, &back] {
        let blobs = parse(json.clone()).unwrap();
        assert_eq!(parse(serde_json::to_value(&blobs).unwrap()).unwrap(), blobs);
        let builds = setup.world.builds_from(blobs.source().unwrap());
        let spec = DeviceSpec {
            blobs,
            ..setup.world.spec.clone()
        };
        let device = Device::open(&spec, builds).unwrap();
        setup.world.check(&device, 0, setup.world.expected.len());
    }
    let only = parse(here).unwrap().source().unwrap();
    assert_eq!(only.open(&setup.name()).err(), Some(BlobError::Missing));
    for wrong in [
        serde_json::json!({"kind": "ftp", "url": url}),
        serde_json::json!({"kind": "directory"}),
        serde_json::json!({"kind": "directory", "path": "/", "more": 1}),
    ] {
        parse(wrong).unwrap_err();
    }
    let tls = serde_json::json!({"kind": "http", "url": "https://a/"});
    assert!(parse(tls).unwrap().source().is_err());
}
