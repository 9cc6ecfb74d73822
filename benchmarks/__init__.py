"""
Benchmarks: what crdtstate costs, next to the least that it could cost.

    python -m benchmarks                    all of them, eight to twelve minutes
    python -m benchmarks --quick            small versions, under two minutes
    python -m benchmarks writes growth      some of them
    python -m benchmarks --json             for machines

Machines differ and share their cores, so what counts is the *ratio* to a *floor*: the same work
done by the bare libraries (pycrdt, apsw, websockets), in the same run, by turns with ours. It says
how many times the floor's cost ours is. Times are CPU time and medians, unless a name says
otherwise: what waits for another process is measured by the wall clock.

    measure      how it is measured: efforts, results, targets, clocks
    children     work in processes of its own
    report       the machine and the table
    writes       local writes and the journal        applies    changes of others
    reads        maps and counters                   propagation  from one agent to another
    fleet        ten agents on one relay             growth     what a million writes leave behind
    recovery     opening a store, snapshots          many       two hundred agents on one relay
    relayed      the relay alone, at 300/s          stalled    one of them does not read
    checkpoints  making and loading them       langgraph  the checkpointer beside LangGraph's own
    mesh         what a fleet of 10 and 100 says  thousand   the same of 1,000; only if named

To add one: a module with a function from `Effort` to results, named in `__main__`.
"""
