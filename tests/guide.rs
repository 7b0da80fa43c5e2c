//! The guide "Write a handler" and the example that the suite runs on are one program.

#[test]
fn the_pieces_of_the_guide_are_the_example_byte_for_byte() {
    let guide = include_str!("../docs/write-a-handler.md");
    let pieces: Vec<_> = guide.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default()).collect();
    assert_eq!(pieces.join("\n"), include_str!("../examples/own_handler.rs"));
}
