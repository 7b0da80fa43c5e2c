//! `bench`: the shape of its answer. How fast anything is, is for a person to read.

use serde_json::Value;

use crate::{Store, run};

const QUICK: [&str; 7] = ["--rounds", "1", "--round", "10ms", "--handovers", "3", "--json"];

fn whats(lines: &[Value]) -> Vec<(&str, u64)> {
    lines.iter().map(|line| (line["what"].as_str().unwrap(), line["tasks"].as_u64().unwrap())).collect()
}

#[test]
fn files_are_measured_beside_the_floor_the_rename_and_the_peer() {
    measured("?durability=none", &["cycle_vs_rename", "session_vs_peer"]);
}

#[test]
fn files_that_wait_for_the_disk_get_no_factor_over_a_peer_that_does_not() {
    measured("", &["cycle_vs_rename"]);
}

fn measured(options: &str, factors: &[&str]) {
    let store = Store::new();
    let answer = store.run_with(options, "bench", &QUICK);
    assert_eq!((answer.status, answer.stderr.as_str()), (0, ""));
    let lines = answer.objects();
    let names = [&["floor", "cycle", "session", "rename", "peer"], factors].concat();
    let expected: Vec<_> = [1, 16].into_iter().flat_map(|tasks| names.iter().map(move |name| (*name, tasks))).collect();
    assert_eq!(whats(&lines), [expected, vec![("handover_processes", 2), ("handover_tasks", 2)]].concat());
    for line in &lines {
        let keys =
            ["what", "dsn", "tasks", "payload", "cycles_per_s", "floor_cycles_per_s", "ratio", "p50_us", "p99_us", "trips"];
        assert!(keys.iter().all(|key| line.get(key).is_some()) && line.as_object().unwrap().len() == keys.len(), "{line}");
        assert!(line["trips"].is_null());
        let (cycles, floor, ratio) =
            (line["cycles_per_s"].as_f64(), line["floor_cycles_per_s"].as_f64(), line["ratio"].as_f64());
        match line["what"].as_str().unwrap() {
            "handover_processes" | "handover_tasks" => {
                assert_eq!((cycles, floor, ratio), (None, None, None));
                assert!(line["p50_us"].as_f64() <= line["p99_us"].as_f64() && line["p50_us"].as_f64() > Some(0.0), "{line}");
            }
            "floor" => assert!(cycles > Some(0.0) && floor.is_none() && ratio.is_none(), "{line}"),
            _ => assert!((cycles.unwrap() / floor.unwrap() / ratio.unwrap() - 1.0).abs() < 0.05, "{line}"),
        }
    }
    // The place of its own is gone again.
    assert_eq!(
        std::fs::read_dir(store.0.path())
            .unwrap()
            .filter(|entry| { entry.as_ref().unwrap().file_name().to_string_lossy().contains("bench") })
            .count(),
        0
    );
}

#[test]
fn a_store_in_memory_has_cycles_only() {
    let lines = run(&[&["bench", "memory://"], &QUICK[..]].concat()).objects();
    assert_eq!(whats(&lines), [("cycle", 1), ("session", 1), ("cycle", 16), ("session", 16)]);
    assert!(lines.iter().all(|line| line["ratio"].is_null() && line["cycles_per_s"].as_f64() > Some(0.0)));
}

#[test]
fn whole_requests_are_measured_in_place_of_all_else() {
    let store = Store::new();
    for lines in [
        run(&[&["bench", "memory://", "--web"], &QUICK[..]].concat()).objects(),
        store.run_with("", "bench", &[&["--web"], &QUICK[..]].concat()).objects(),
    ] {
        assert_eq!(whats(&lines), [("web", 1), ("web", 16)]);
        assert!(lines.iter().all(|line| line["cycles_per_s"].as_f64() > Some(0.0)));
    }
}

#[test]
fn a_mistake_in_the_last_store_is_told_before_the_first_is_measured() {
    run(&["bench", "memory://", "memory://?wiat=1s"]).refused(2, "did you mean wait?");
}

#[test]
fn people_get_a_table() {
    let answer = run(&["bench", "memory://", "--rounds", "1", "--round", "5ms"]);
    let lines: Vec<_> = answer.text().lines().collect();
    assert!(lines[0].starts_with("memory://  2.0 KiB a session, 1 round of 5 ms"), "{answer:?}");
    assert!(lines[1].trim_start().starts_with("what") && lines.len() == 7, "{answer:?}");
}
