"""Measuring models: suites, intervals, reports."""
