"""What a training step costs, beside other programs' and beside what the device could do: `mmalign bench`.

Every number comes out of the functions behind `mmalign train`: `bench` says what runs, `runs` lets it run, `measure`
measures it, `tables` shows it; `against` has other programs' steps, `cases` models and pairs to run them on, and
`scale` what a pair costs as something grows.
"""
