"""What is done with a drive: a module for each stage, which reads, computes and writes.

The stages are probe, plan, infer, align, fuse and report. Beside them are what they share (keys,
frames, retries), their computations (fusion, meshes), and what looks at all of a drive or a
collection: planner, rates, ledger, budget, summary, export, evaluate.
"""
