"""Proof on the user's own machine: steps that measure, the checkout's tests, one record of both."""
