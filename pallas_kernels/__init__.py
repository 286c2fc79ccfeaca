"""Operations with several implementations, chosen by name; arrays in, arrays out."""
