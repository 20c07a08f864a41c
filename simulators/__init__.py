"""Simulators other than SMAX, behind the interface of envs.py: MuJoCo robots and StarCraft II."""
