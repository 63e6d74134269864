"""What a model can do, dense and sparse, with intervals; which layer fails on long text, and how it is repaired.

`subject` is what is evaluated: a model, its tokenizer and, where there is one, the method on it. `perplexity` and
`ruler` measure it; `harness` shows it to lm-eval, for RULER and for any other of its tasks. `diagnosis` finds the layer
that breaks long context, from the answers' likelihood (`answers`) while single layers are dense or sparse (`sweeps`);
`repairing` mends that layer, and only if `accepting` says that nothing else got worse. lm-eval is an extra: nothing
here imports it before a RULER document or an lm-eval task is asked for.
"""
