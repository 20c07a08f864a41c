"""One run of train.py: its flags checked, its folder, metrics and checkpoint, its report.

setup        flags checked; data, device and simulator chosen
folder       a run's folder: one owner at a time; its files judged when they are read back
stopping     Ctrl-C and SIGTERM save first
tracking     class Run: progress bars, metrics.csv, TensorBoard, checkpoint.pt
diagnostics  errors of the world model; what can be said of a policy without playing it
report       the closing table, run.png and final.json; tables over several runs
watch        a GIF of a run's policy
imagined     a GIF of a recorded episode beside the world model's rollout

python -m experiment watch RUN          python -m experiment report RUN...
"""
