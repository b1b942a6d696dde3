"""Graphs and features as files of Neuronpedia and circuit-tracer. Knows graphs only."""
