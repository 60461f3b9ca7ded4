//! What must hold for any bytes; fuzzed by the targets, replayed over the corpora by an ordinary
//! test.
#![allow(dead_code)]

use diapause_pager::control::Ask;
use diapause_pager::nodes::{NodeText, Nodes};
use diapause_pager::packet::Packet;
use diapause_pager::wire::{
    self, Call, Init, Request, HAS_RESEND, NAME_BYTES_MAX, READ_BYTES_MAX, REPLY_HEAD, REQUEST_HEAD,
};

/// Checks bytes as a request, also with the length that they have: a wrong one stops a fuzzer at
/// the door.
pub fn request(bytes: &[u8]) {
    check_request(bytes);
    if bytes.len() >= REQUEST_HEAD {
        let mut right = bytes.to_vec();
        right[..4].copy_from_slice(&(bytes.len() as u32).to_ne_bytes());
        check_request(&right);
    }
}

fn check_request(bytes: &[u8]) {
    let Ok(request) = Request::parse(bytes) else {
        return;
    };
    // What is answered has to carry the name of what was asked.
    assert_eq!(Request::unique_of(bytes), Some(request.unique));
    let head = wire::head(request.unique, 0, 0);
    assert_eq!(Request::unique_of(&head), Some(request.unique));
    assert_eq!(head.len(), REPLY_HEAD);
    match request.call {
        Call::Lookup(name) => assert!(name.len() <= NAME_BYTES_MAX && !name.contains(&0)),
        Call::Read { size, .. } => assert!(size as usize <= READ_BYTES_MAX),
        Call::Init(init) => greeting(&init),
        _ => {}
    }
}

/// A kernel is granted only what it offers, in an answer of the size that its version knows.
fn greeting(init: &Init) {
    let granted = wire::granted(init.features);
    assert_eq!(granted & !init.features, 0);
    assert_eq!(granted & HAS_RESEND, init.features & HAS_RESEND);
    if let Some(reply) = wire::init_reply(init) {
        assert_eq!(reply.len(), 64);
        assert_eq!(init.major, 7);
    }
}

/// Checks a text as a packet of a client: what is taken is kept as it was understood.
pub fn packet(text: &[u8]) {
    let packet = Packet {
        text: text.to_vec(),
        fds: Vec::new(),
    };
    let Ok(Ask::Put { name, spec }) = packet.parse() else {
        return;
    };
    let nodes = Nodes::take_up(std::iter::empty(), 0);
    let Ok(planned) = nodes.plan(&name, &spec) else {
        return;
    };
    assert!(spec.size_bytes > 0 && spec.size_bytes % 4096 == 0);
    // A pager that is started later has it from the keeper, as text.
    let text = serde_json::to_vec(&planned).expect("a text");
    let again: NodeText = serde_json::from_slice(&text).expect("the same");
    assert_eq!(again, planned);
    nodes.put(&name, planned.clone());
    assert_eq!(nodes.find(&name).map(|node| node.text()), Some(planned));
    // Where its builds lie is a place, or is refused in words; nothing is opened yet.
    let _ = spec.blobs.source();
}
