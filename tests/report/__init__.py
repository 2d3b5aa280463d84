"""Tests of pages, pictures, lists and comparisons of runs."""
