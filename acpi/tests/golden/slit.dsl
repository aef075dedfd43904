[000h 0000   4]                    Signature : "SLIT"    [System Locality Information Table]
[004h 0004   4]                 Table Length : 00000035
[008h 0008   1]                     Revision : 01
[009h 0009   1]                     Checksum : 68
[00Ah 0010   6]                       Oem ID : "DORMSE"
[010h 0016   8]                 Oem Table ID : "DORMOUSE"
[018h 0024   4]                 Oem Revision : 00000001
[01Ch 0028   4]              Asl Compiler ID : "RVAT"
[020h 0032   4]        Asl Compiler Revision : 01000000

[024h 0036   8]                   Localities : 0000000000000003
[02Ch 0044   3]                 Locality   0 : 0A 15 28
[02Fh 0047   3]                 Locality   1 : 15 0A 14
[032h 0050   3]                 Locality   2 : 14 14 0A

Raw Table Data: Length 53 (0x35)

    0000: 53 4C 49 54 35 00 00 00 01 68 44 4F 52 4D 53 45  // SLIT5....hDORMSE
    0010: 44 4F 52 4D 4F 55 53 45 01 00 00 00 52 56 41 54  // DORMOUSE....RVAT
    0020: 00 00 00 01 03 00 00 00 00 00 00 00 0A 15 28 15  // ..............(.
    0030: 0A 14 14 14 0A                                   // .....
