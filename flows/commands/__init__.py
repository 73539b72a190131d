"""What `ttt3r` can be told to do: a module for each command, or for commands of a kind.

A module's `app` holds its commands; `flows.cli` puts them together. Commands import what they need
when they run: torch, Open3D and Prefect take seconds. What several share is in `options` (of most
commands), `settings` (of a reconstruction) and `printing`.
"""
